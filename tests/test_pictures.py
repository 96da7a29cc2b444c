"""Pictures as data sets hold them: their colours, where they are stored, which column has them."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import List, Value
from PIL import Image
from test_data import A_BLUE, A_RED, IMAGE_GONE, PICTURE, RED, TEXT, asked, load, sizes, write
from test_data import png as stored
from test_data import write_lines as lines

from commands import benchmarks
from plumbing import Unusable, UsageError, pictures
from plumbing.pictures import as_seen

# ---------------------------------------------------------------------- colours


def file_of(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """The image as a file brings it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def two(mode: str, left, right) -> Image.Image:
    """A picture of two pixels."""
    image = Image.new(mode, (2, 1), left)
    image.putpixel((1, 0), right)
    return image


def deep(*values, dtype="uint16") -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def png_of(depth: int, colour: int, pixels: bytes, transparent: bytes = b"") -> Image.Image:
    """A PNG of two pixels, of a kind that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    head += chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + data))


BLACK, WHITE, TURNED = (0, 0, 0), (255, 255, 255), Image.Exif()
TURNED[0x0112] = 3  # by half a turn
PALETTE = two("P", 0, 1)
PALETTE.putpalette([0, 0, 0, 200, 30, 40])
SEEN = [  # a picture of two pixels, and their colours
    (file_of(two("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))), BLACK, WHITE),
    (file_of(two("RGBA", (0, 0, 0, 255), (0, 0, 0, 51))), BLACK, (204,) * 3),
    (file_of(two("RGBA", (0, 0, 0, 255), (255, 255, 255, 0))), BLACK, WHITE),
    (file_of(two("RGBA", (200, 30, 40, 255), (0, 0, 0, 0)), "WEBP", lossless=True), None, WHITE),
    (file_of(two("LA", (0, 255), (0, 0))), BLACK, WHITE),
    (file_of(PALETTE), BLACK, (200, 30, 40)),
    (file_of(PALETTE, transparency=0), WHITE, (200, 30, 40)),
    (file_of(PALETTE, "GIF", transparency=0), WHITE, (200, 30, 40)),
    (file_of(two("L", 0, 90), transparency=0), WHITE, (90,) * 3),
    (file_of(two("RGB", BLACK, (9, 8, 7)), transparency=BLACK), WHITE, (9, 8, 7)),
    (file_of(deep(3000, 40000)), (12,) * 3, (156,) * 3),
    (file_of(deep(3000, 65535), "TIFF"), (12,) * 3, WHITE),
    (file_of(deep(3000, 40000), "PPM"), (12,) * 3, (156,) * 3),
    (Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 3000, 40000)), (12,) * 3, (156,) * 3),
    (file_of(deep(3000, 40000, dtype="int32"), "TIFF"), (12,) * 3, (156,) * 3),
    (file_of(deep(1 << 30, 1 << 31, dtype="uint32").convert("I"), "TIFF"), None, None),
    (file_of(deep(0.2, 0.8, dtype="float32"), "TIFF"), (51,) * 3, (204,) * 3),
    (file_of(deep(51.0, 230.0, dtype="float32"), "TIFF"), (51,) * 3, (230,) * 3),
    (file_of(deep(-0.5, float("nan"), dtype="float32"), "TIFF"), BLACK, BLACK),
    (png_of(16, 0, struct.pack(">HH", 0, 40000), struct.pack(">H", 0)), WHITE, (156,) * 3),
    (png_of(16, 4, struct.pack(">4H", 0, 0, 40000, 65535)), WHITE, (156,) * 3),
    (png_of(16, 2, struct.pack(">6H", 0, 0, 0, 40000, 0, 0)), BLACK, (156, 0, 0)),
    (file_of(two("1", 0, 1)), BLACK, WHITE),
    (file_of(two("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), WHITE, BLACK),
    (file_of(two("L", 90, 9), "PNG", exif=TURNED), (9,) * 3, (90,) * 3),
]


@pytest.mark.parametrize(("image", "left", "right"), SEEN)
def test_a_picture_is_what_a_person_sees(image, left, right):
    seen = as_seen(image)
    assert (seen.mode, seen.size) == ("RGB", (2, 1))
    assert left in (None, seen.getpixel((0, 0))) and right in (None, seen.getpixel((1, 0)))


def test_training_and_evaluation_see_the_same(tmp_path):
    image = Image.new("RGBA", (40, 36), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (3, 3, 20, 9))
    features = {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}
    (trained,) = load(write(tmp_path / "a.parquet", features, [([image], "?", "1")] * 2))[0][
        0
    ].images
    row = {"image": image, "question": "Options: A: yes, B: no", "answer": "A"}
    table = datasets.Dataset.from_list([row]).cast_column("image", PICTURE)
    table.to_parquet(tmp_path / "mmstar.parquet")
    (item,) = benchmarks.items_of("mmstar", str(tmp_path))
    assert item.prompt().images[0].tobytes() == trained.tobytes()
    assert (trained.getpixel((0, 0)), trained.getpixel((5, 5))) == (WHITE, BLACK)


def test_a_failing_disk_is_no_broken_picture(monkeypatch):
    errors = iter([OSError(5, "Input/output error"), OSError("cut")])

    def fail(image):
        raise next(errors)

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", fail)
    for kind in (OSError, Unusable):
        with pytest.raises(kind):
            as_seen(RED)


# ---------------------------------------------------------------------- where they are stored

RAW = stored(RED)["bytes"]
ENCODED = base64.b64encode(RAW).decode()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Value("binary"), RAW),
        (List(Value("binary")), [RAW]),
        (PICTURE, {"bytes": RAW, "path": None}),
        (PICTURE, {"bytes": None, "path": "{folder}/red.png"}),
        ({"bytes": Value("binary"), "path": TEXT}, {"bytes": RAW, "path": "gone.png"}),
        ({"bytes": Value("binary")}, {"bytes": RAW}),
        ({"path": TEXT}, {"path": "red.png"}),
        (TEXT, "red.png"),
        (TEXT, "./red.png"),
        (TEXT, "sub/../red.png"),
    ],
)
def test_stored_pictures_that_are_read(tmp_path, kind, value):
    (tmp_path / "sub").mkdir()
    RED.save(tmp_path / "red.png")
    if isinstance(value, dict) and value.get("path"):
        value = value | {"path": value["path"].format(folder=tmp_path)}
    features = {"images": kind, "problem": TEXT, "answer": TEXT}
    assert sizes(load(write(tmp_path / "a.parquet", features, [(value, "?", "1")] * 2))[0]) == [
        [A_RED]
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (f"data:image/png;base64,{ENCODED}", "str 'data:image/png;base64,iVBORw0KGgo"),
        (ENCODED, "str 'iVBORw0KGgo"),
        ("https://host/a.png", "str 'https://host/a.png'.; .*No downloads"),
        ("['a.png', 'b.png']", r"""str "\['a.png', 'b.png'\]"""),
        ("gone.png", "str 'gone.png"),
        ("", "str ''"),  # no path is no picture
        ([""], "str ''"),
        ("sub", "str 'sub"),
        ("pipe", "str 'pipe"),
        ("nul\0.png", r"str 'nul\\x00.png"),
        ("drawing.eps", "str 'drawing.eps"),  # Ghostscript is not started
        (5, "int '5'"),
        ([["red.png"]], r"""list "\['red.png'\]"""),
        ({"url": "a.png"}, """dict "{'url': 'a.png'}"""),
    ],
)
def test_stored_pictures_that_are_not_read(tmp_path, value, shown):
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    RED.convert("RGB").save(tmp_path / "drawing.eps")
    path = lines(tmp_path / "a.jsonl", [{"images": value, "problem": "?", "answer": "1"}] * 2)
    with pytest.raises(UsageError, match=f"1 dropped: {IMAGE_GONE} .row 0: {shown}"):
        load(path)


def test_paths_that_lead_out_of_the_folder_are_said_once(tmp_path, capsys):
    RED.save(tmp_path / "red.png")
    (tmp_path / "data").mkdir()
    rows = [{"images": "../red.png", "problem": f"{n}?", "answer": "1"} for n in range(4)]
    assert sizes(load(lines(tmp_path / "data/a.jsonl", rows))[0]) == [[A_RED]] * 3
    assert capsys.readouterr().out.count("data: paths of images lead out of this folder") == 1


# ---------------------------------------------------------------------- which column has them

NAMED = "pictures in {} would not be asked; name their column"


@pytest.mark.parametrize(
    ("columns", "text", "message"),
    [
        ({"image": (PICTURE, RED)}, "?", NAMED.format("image")),
        ({"picture": (PICTURE, RED)}, "?", NAMED.format("picture")),
        ({"figures": (List(PICTURE), [RED])}, "?", NAMED.format("figures")),
        ({"image": (TEXT, "a.png")}, "?", NAMED.format("image")),
        ({"image": (List(TEXT), ["b/a b.JPEG"])}, "?", NAMED.format("image")),
        ({"image": (TEXT, "https://host/a.webp?size=3")}, "?", NAMED.format("image")),
        ({"image": (TEXT, f"data:image/png;base64,{ENCODED}")}, "?", NAMED.format("image")),
        ({"image": (TEXT, ENCODED)}, "?", NAMED.format("image")),
        ({"image": (Value("binary"), RAW)}, "?", NAMED.format("image")),
        ({"image": (Value("binary"), b"II*\0\x08" + RAW)}, "?", NAMED.format("image")),
        ({"image": ({"path": TEXT}, {"path": "a.png"})}, "?", NAMED.format("image")),
        ({"meta": (List({"file": TEXT}), [{"file": "a.png"}])}, "?", NAMED.format("meta")),
        ({"image": (TEXT, "['a.png', 'b.png']")}, "?", NAMED.format("image")),
        ({"image": (TEXT, "it's.svg")}, "?", NAMED.format("image")),
        (
            {"image_1": (PICTURE, RED), "image_2": (PICTURE, RED)},
            "<image 1>?",
            NAMED.format("image_1, image_2"),
        ),
        (
            {},
            "Look at <image 1>",
            "more <image> marks than images .row 0: str '<image 1>'.; name the",
        ),
        ({}, "Look at <img>", "marks than images .row 0: str '<img>"),
        ({}, "Look at <Image>", "marks than images .row 0: str '<Image>"),
        ({}, "Look at <img src=a.png />", "marks than images .row 0: str '<img src=a.png />'"),
        ({}, "Look at <image_2>", "marks than images .row 0: str '<image_2>"),
        ({"source": (TEXT, "see a.png, page 3")}, "?", None),
        ({"note": (TEXT, None), "blob": (Value("binary"), b"\0\1")}, "a < b, <i>, img?", None),
    ],
)
def test_pictures_that_nobody_reads(tmp_path, columns, text, message):
    features = {"problem": TEXT, "answer": TEXT} | {
        name: kind for name, (kind, _) in columns.items()
    }
    row = (text, "1", *(value for _, value in columns.values()))
    path = write(tmp_path / "a.parquet", features, [row] * 3)
    if message is None:
        assert sizes(load(path)[0]) == [[], []]
    else:
        with pytest.raises(UsageError, match=message):
            load(path)
    if columns and "<" not in text:
        assert sizes(load(path, "images=")[0]) == [[], []]  # by the user's own word


@pytest.mark.parametrize(
    ("text", "shown", "widths"),
    [
        ("From <image 1> and <image 2>?", "From*and*?", [40, 64]),
        ("<image 2> or <image 1>", "*or*", [64, 40]),
        ("<image_1> alone", "**alone", [64, 40]),
        ("Twice: <image2>, <image2>", "*Twice:*,*", [40, 64, 64]),
        ("<img>, <Image>.", "*,*.", [40, 64]),
        (
            "<|vision_start|><|image_pad|><|vision_end|>\nHow long is <image>?",
            "*How long is*?",
            [40, 64],
        ),
        ("<image></image> and <img/></img>?", "*and*?", [40, 64]),
        ("None.", "**None.", [40, 64]),
        ("<image 3>", None, None),
        ("<image><image><image>", None, None),
    ],
)
def test_marks_say_where_pictures_stand(tmp_path, text, shown, widths):
    features = {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}
    two_images = [RED, Image.new("RGB", A_BLUE)]
    path = write(tmp_path / "a.parquet", features, [(two_images, text, "1")] * 2)
    if shown is None:
        with pytest.raises(UsageError, match="more <image> marks than images"):
            load(path)
    else:
        prompt = load(path)[0][0]
        assert (asked(prompt), [image.width for image in prompt.images]) == (shown, widths)


def test_what_is_beside_the_columns_that_are_read_is_said(tmp_path, capsys):
    row = {"problem": "?", "answer": "1", "images": [], "image_2": "b.png", "options": ["a", "b"]}
    load(lines(tmp_path / "a.jsonl", [row] * 2))
    said = capsys.readouterr().out
    assert "a.jsonl: pictures in image_2 are not asked" in said
    assert "a.jsonl: options in options are not shown to the policy; --columns choices=op" in said


def test_a_rare_mark_costs_its_row(tmp_path):
    """In a data set without pictures; where many rows have one, nobody reads its pictures."""
    rows = [{"problem": f"{n}?", "answer": "1"} for n in range(19)]
    few = lines(Path(tmp_path) / "few.jsonl", [{"problem": "<img>?", "answer": "1"}, *rows])
    assert load(few)[0].dropped == {"more <image> marks than images": 1}
    many = lines(Path(tmp_path) / "many.jsonl", [{"problem": "<img>?", "answer": "1"}] * 4 + rows)
    with pytest.raises(UsageError, match="22 rows, 4 dropped: more <image> marks than images"):
        load(many)
