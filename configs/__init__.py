"""Complete runs as YAML. The header of each file says the command, the hardware, the time and the expected figure."""
