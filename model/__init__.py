"""The Ropeway model: one causal Transformer over text tokens and raw pixel patches. Tensors in, tensors out.

Legend of the shape suffixes used in this package (a suffix names the logical axes, in order):

    B  rows of a batch (or samples while generating)      N  patches, or any selection of slots, of a batch
    S  slots of a row                                     P  numbers of a patch: patch_size * patch_size * 3
    T  capacity of a decode state in slots                W  width of the diffusion head
    D  width of the backbone                              V  vocabulary
    H  query heads                                        M  noise draws: N * draws
    K  key/value heads                                    F  rotary pairs of a head: E / 2
    E  width of a head                                    G  documents of a group, all padded to length L
    L  slots of the longest document of a group           2  the two position coordinates (row, column)

Flow time runs from noise (t = 0) to data (t = 1), everywhere. Pixels are in [-1, 1] inside the model.
"""
