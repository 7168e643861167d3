"""Makes the files beside it: the same few documents in every format that data.prepare reads.

    python tests/data/samples/make.py

The pictures are a PNG with transparency, a turned JPEG and a grayscale PNG of 16 bits.
"""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
CAPTIONS = ["a red circle", "a blue square, turned\nin two lines", 'größer: ein graues "Dreieck" 🙂']
NAMES = ["0.png", "1.jpg", "2.png"]
TEXTS = {"a.txt": "The first paragraph.\nIts second line.\n\n\nThe second.", "b.txt": "One line\n"}


def draw() -> list[bytes]:
    """The three image files."""
    rng = np.random.default_rng(0)
    clear = PIL.Image.fromarray(rng.integers(0, 256, (16, 24, 4), dtype=np.uint8), "RGBA")
    photo = PIL.Image.fromarray(np.linspace(0, 255, 20 * 30 * 3).astype(np.uint8).reshape(20, 30, 3))
    deep = PIL.Image.fromarray(rng.integers(0, 65536, (9, 13), dtype=np.uint16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    files = [io.BytesIO() for _ in range(3)]
    clear.save(files[0], "PNG")
    photo.save(files[1], "JPEG", exif=exif)
    deep.save(files[2], "PNG")
    return [file.getvalue() for file in files]


def write_lines(name: str, records: list[dict]) -> None:
    (HERE / name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def main() -> None:
    images = draw()
    for folder in ("pictures", "text", "hf"):
        (HERE / folder).mkdir(exist_ok=True)
    for name, data in zip(NAMES, images, strict=True):
        (HERE / "pictures" / name).write_bytes(data)
    paths = [f"pictures/{name}" for name in NAMES]
    pairs = list(zip(CAPTIONS, paths, images, strict=True))

    # Pairs: the caption, then the picture, both learned.
    write_lines("canonical.jsonl", [{"id": p, "segments": [{"text": c}, {"image": p}]} for c, p, _ in pairs])
    write_lines("pictures/metadata.jsonl", [{"file_name": n, "text": c} for n, c in zip(NAMES, CAPTIONS, strict=True)])
    write_lines("interleaved.jsonl", [{"texts": [c, None], "images": [None, p]} for c, p, _ in pairs])
    with open(HERE / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *((p, c) for c, p, _ in pairs)])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            (
                "segments",
                pa.list_(
                    pa.struct(
                        [
                            ("text", pa.string()),
                            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                            ("learn", pa.bool_()),
                        ]
                    )
                ),
            ),
        ]
    )
    rows = [{"id": p, "segments": [{"text": c}, {"image": {"bytes": b}, "learn": True}]} for c, p, b in pairs]
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, HERE / "canonical.parquet", row_group_size=2)
    with pa.ipc.new_file(HERE / "canonical.arrow", schema) as writer:
        writer.write_table(table, max_chunksize=2)
    columns = {"caption": CAPTIONS, "picture": [{"bytes": b, "path": n} for b, n in zip(images, NAMES, strict=True)]}
    pq.write_table(pa.table(columns), HERE / "hf" / "pairs.parquet")
    (HERE / "hf.yaml").write_text(
        "# Run from the root of the repository.\n"
        "dataset: {path: parquet, data_files: tests/data/samples/hf/pairs.parquet, split: train}\n"
        "segments:\n  - {text: caption}\n  - {image: picture}\n"
    )
    with tarfile.open(HERE / "pairs.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, caption, data in zip(NAMES, CAPTIONS, images, strict=True):
            key, _, extension = name.partition(".")
            for member, content in ((f"set/{key}.{extension}", data), (f"set/{key}.txt", caption.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    # A conversation, its counterpart in the canonical schema, and the same as a page of matched sentences.
    talk = [
        {"from": "human", "value": "<image>\nWhat is <image>?"},
        {"from": "gpt", "value": "A picture."},
        {"from": "human", "value": "Thanks."},
        {"from": "gpt", "value": "Yes."},
    ]
    (HERE / "llava.json").write_text(json.dumps([{"id": "7", "image": paths[:2], "conversations": talk}], indent=1))
    said = [
        {"image": paths[0], "learn": False},
        {"text": "\nWhat is ", "learn": False},
        {"image": paths[1], "learn": False},
        {"text": "?\n", "learn": False},
        {"text": "A picture.\n"},
        {"text": "Thanks.\n", "learn": False},
        {"text": "Yes."},
    ]
    write_lines("llava-canonical.jsonl", [{"id": "7", "segments": said}])
    page = {"text_list": ["First.", "Second.", "Third."]}
    page["image_info"] = [{"image_name": p, "matched_text_index": k} for p, k in ((paths[2], 2), (paths[0], 1))]
    write_lines("mmc4.jsonl", [page])
    parts = [{"text": "First. "}, {"image": paths[0]}, {"text": "Second. "}, {"image": paths[2]}, {"text": "Third."}]
    write_lines("mmc4-canonical.jsonl", [{"segments": parts}])

    # Plain text: a document per file.
    for name, content in TEXTS.items():
        (HERE / "text" / name).write_text(content)
    write_lines("text-canonical.jsonl", [{"id": n, "segments": [{"text": t}]} for n, t in TEXTS.items()])


if __name__ == "__main__":
    main()
