"""Names that come from other people's files, kept within the folder that they speak of."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from welltuned.errors import InputError


def named(folder: Path, name: object, where: str) -> Path:
    """`folder / name`, where `name` is a relative path without `..`; a link in its place is followed.

    Raises:
        InputError: the name is no text, absolute, holds `..` or a NUL.
    """
    if not isinstance(name, str) or not name:
        raise InputError("a file's name is missing or no text", where=where)
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in name:
        mend = "take the file from a source that you trust"
        raise InputError(f"it names the file {name!r}, which lies outside of its folder", where=where, mend=mend)
    return folder / name


def inside(folder: Path, name: object, where: str) -> Path:
    """The same, and no link on the way leads out of the folder.

    Raises:
        InputError: as `named`, or a link leads out.
    """
    path = named(folder, name, where)
    if not path.resolve().is_relative_to(folder.resolve()):
        mend = "put the file itself in the folder"
        raise InputError(f"the link {name!r} leads out of its folder", where=where, mend=mend)
    return path
