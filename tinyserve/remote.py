"""Images behind URIs such as ``s3://bucket/folder``, through pyarrow's file systems."""

from functools import partial
from typing import Any
from urllib.parse import quote

from tinyserve.errors import DataError, ImageError, UsageError, first_line
from tinyserve.images import is_image_name, read_from
from tinyserve.members import SUFFIXES_OF_ARCHIVES, Member

_OF_URIS = "%/:?#[]@!$&'()*+,;=~"
"""What means something in a URI and stays as it is."""


def members(uri: str) -> tuple[str, list[Member]]:
    """The path of a URI, and the image behind it, or all anywhere below it.

    It and their names are paths inside the file system, ``bucket/folder/1.jpg``. The URI takes
    pyarrow's options, as in ``s3://bucket/folder?region=eu-west-1``. Raises
    :class:`~tinyserve.errors.DataError` where it cannot be listed or is an archive.
    """
    filesystem, root = _file_system(uri)
    import pyarrow.fs as fs

    try:
        alone = filesystem.get_file_info(root).is_file
        if alone:
            found = [root]
        else:
            below = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
            found = [info.path for info in below if info.is_file and is_image_name(info.path)]
    except Exception as error:  # those of pyarrow and of what it reads with share no base class
        raise DataError(f"cannot list {uri}: {first_line(error)}") from error
    if alone and root.lower().endswith(SUFFIXES_OF_ARCHIVES):
        raise DataError(f"archives are read in place from disks alone: download {uri} first")
    return root.rstrip("/"), [
        Member(path, None, partial(_read, filesystem, path)) for path in found
    ]


def uri_of(name: str, uri: str) -> str:
    """That of the member of such a name among those of ``uri``.

    Without the options of ``uri`` and whom it names before the host, which may be secrets and
    would be written into every row: what is read with such options, as on a server of one's own,
    is read again by the whole of ``uri``, not by this.
    """
    return f"{uri.partition('://')[0]}://{quote(name, errors='surrogateescape')}"


def read_text(uri: str, path: str) -> str | None:
    """A text file in the file system of a URI; None where there is none.

    Raises :class:`~tinyserve.errors.DataError` where it cannot be read, or it cannot be told
    whether there is one. Who may read but not list hears of both that access is denied, from S3;
    then it is taken for not there.
    """
    filesystem, _ = _file_system(uri)
    import pyarrow.fs as fs

    try:
        if filesystem.get_file_info(path).type == fs.FileType.NotFound:
            return None
    except Exception as error:  # as in members()
        if "ACCESS_DENIED" in str(error) and not _can_list(filesystem, path.rpartition("/")[0]):
            return None
        raise DataError(f"cannot read {uri_of(path, uri)}: {first_line(error)}") from error
    try:
        with filesystem.open_input_stream(path) as file:
            return read_from(file).decode("utf-8-sig", errors="replace")
    except Exception as error:
        raise DataError(f"cannot read {uri_of(path, uri)}: {first_line(error)}") from error


def _can_list(filesystem: Any, folder: str) -> bool:
    import pyarrow.fs as fs

    try:
        filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    except Exception:  # as in members()
        return False
    return True


def _file_system(uri: str) -> tuple[Any, str]:
    """What pyarrow reads a URI with, and the path in there."""
    try:
        import pyarrow.fs as fs
    except ModuleNotFoundError as error:
        raise UsageError(f"{uri} needs: pip install 'tinyserve[parquet]'") from error
    try:
        # People write spaces and accents as they are, of which no URI has any.
        filesystem, path = fs.FileSystem.from_uri(quote(uri, _OF_URIS, errors="surrogateescape"))
    except Exception as error:  # as in members()
        raise UsageError(f"cannot read from {uri}: {first_line(error)}") from error
    return filesystem, path


def _read(filesystem: Any, path: str) -> bytes:
    try:
        with filesystem.open_input_stream(path) as file:
            return read_from(file)
    except ImageError:
        raise
    except Exception as error:  # as in members()
        raise ImageError(f"cannot read: {first_line(error)}") from error
