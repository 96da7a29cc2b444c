"""Pictures, from what a data set stores to what a person sees. Training and evaluation share it."""

import functools
import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from plumbing import Unusable

# All that Pillow reads would be too many: EPS starts Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
STORED = re.compile(  # base64, a data URI, or a name, also of a list that was written as text
    r"""data:image/.*|(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR).*"""
    r"""|[\["']*[^\n]{1,300}\.(?:avif|bmp|gif|heic|jpe?g|jp2|png|svg|tiff?|webp)(?:\?\S*)?[]"']*""",
    re.IGNORECASE | re.DOTALL,
)
MAGIC = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
NO_IMAGE = "an image missing or unreadable"
say_once = functools.cache(tqdm.write)


def open_image(stored: str | bytes | dict, folder: Path) -> Image.Image:
    """A picture from a path, its bytes or `datasets`' {"bytes", "path"}; pixels are read later.

    Raises Unusable where it is none of these, or no such file is there.
    """
    found = stored
    if isinstance(found, dict) and found.keys() & {"bytes", "path"}:
        found = found.get("bytes") or found.get("path")
    try:
        if isinstance(found, bytes):
            return Image.open(BytesIO(found), formats=FORMATS)
        path = folder / found
        if not path.is_file():  # a pipe would hang, and a folder is no picture
            raise FileNotFoundError(found)
        if ".." in Path(found).parts and not path.resolve().is_relative_to(folder.resolve()):
            say_once(f"{folder}: paths of images lead out of this folder, by '..'")
        return Image.open(path, formats=FORMATS)
    except Exception as error:  # Pillow raises a dozen types for what is no picture
        raise Unusable(
            NO_IMAGE,
            "images are pictures, their bytes, or paths from the data file's folder on: unpack "
            "them there. No downloads, and no base64: save such pictures as files first",
            got=found,
        ) from error


def as_seen(image: Image.Image) -> Image.Image:
    """RGB as a person sees it: turned by its EXIF, deep greys scaled to 8 bits, on white.

    Raises Unusable for broken pixels, and OSError for a disk that fails.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen types for broken pixels
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        raise Unusable("an image cannot be read", got=error) from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits: white is 65535. Of floats it is 1, 255 or 65535, the first to hold
    them all; where none does, it is the largest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    whites = [white for white in (1, 255, 65535) if white == 65535 or image.mode == "F"]
    white = next((white for white in whites if values.max() <= white), values.max())
    values[values == image.info.get("transparency")] = white
    return Image.fromarray((values.clip(min=0) * (255 / white)).round().astype(np.uint8))


def columns_of_pictures(data, used: list[str]) -> list[str]:
    """Columns, but those in use, that are of pictures by their type or by some of their values."""
    kinds = {name: repr(kind) for name, kind in data.features.items() if name not in used}
    found = [name for name, kind in kinds.items() if "Image(" in kind]
    texts = [name for name, kind in kinds.items() if re.search("string|binary|Json", kind)]
    rows = data.select_columns([name for name in texts if name not in found])
    for row in rows.select(range(0, len(data), len(data) // 1000 + 1)):
        found += [name for name in row if name not in found and holds_picture(row[name])]
    return found


def holds_picture(stored) -> bool:
    """Whether it, or what is inside of it, begins or is named as pictures do."""
    if isinstance(stored, list | dict):
        return any(map(holds_picture, stored.values() if isinstance(stored, dict) else stored))
    if isinstance(stored, bytes):
        return stored.startswith(MAGIC)
    return isinstance(stored, str) and bool(STORED.fullmatch(stored))
