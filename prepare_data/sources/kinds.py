"""What is not plain text: told by the ending of a name when a folder is listed, and by the first bytes when a file is
read. Formats that hold text get the advice that helps: unpack an archive, save a document as text.
"""

UNPACK, SAVE_AS_TEXT, NONE = "unpack it first", "open it in its program and save it as plain text", ""

# Kinds of files that are left out of a folder, with their endings. Ambiguous endings are not here (.ts is a video or
# TypeScript, .dat may be text): those files are told by their content.
SKIPPED_ENDINGS = {
    "documents that are not plain text (save them as text to use them)": (
        ".doc .docx .docm .dot .dotx .odt .ott .rtf .pdf .epub .mobi .azw .azw3 .djvu .pages .ppt .pptx .odp .key.zip"
        " .xls .xlsx .xlsm .ods .numbers .chm"
    ),
    "archives (unpack them to use them)": (
        ".zip .7z .rar .tar .tar.gz .tgz .tbz2 .txz .bz2 .xz .lzma .zst .lz4 .z .cab .iso .dmg .jar"
        " .apk .deb .rpm .whl .egg"
    ),
    "images, sound, programs, model weights and other binary files": (
        ".png .jpg .jpeg .jpe .gif .bmp .tif .tiff .webp .avif .heic .heif .ico .icns .psd .xcf .raw .cr2 .nef .jxl"
        " .mp3 .m4a .aac .wav .flac .ogg .oga .opus .wma .aiff .mid .midi .mp4 .m4v .mov .avi .mkv .webm .wmv .flv .mpg"
        " .mpeg .3gp .ttf .otf .woff .woff2 .eot .exe .dll .so .dylib .o .a .obj .lib .class .pyc .pyo .pyd .wasm .msi"
        " .bin .safetensors .pt .pth .ckpt .gguf .onnx .npy .npz .pkl .pickle .h5 .hdf5 .tflite .pb .parquet .arrow"
        " .feather .sqlite .sqlite3 .db .mo .pack .blend .stl"
    ),
}
BACKUPS = "backups and settings that programs left there"
BACKUP_ENDINGS = ("~", ".bak", ".orig", ".rej", ".swp", "desktop.ini")
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "venv", "__MACOSX"}
_REASONS = {ending: reason for reason, endings in SKIPPED_ENDINGS.items() for ending in endings.split()}

# (offset, bytes, what it is, advice). Where the bytes are letters, a NUL byte must follow: text may begin with them.
_SIGNATURES = (
    (0, b"%PDF-", "a PDF document", SAVE_AS_TEXT),
    (0, b"{\\rtf", "an RTF document, whose text is mixed with markup", SAVE_AS_TEXT),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", SAVE_AS_TEXT),
    (60, b"BOOKMOBI", "an e-book", SAVE_AS_TEXT),
    (0, b"AT&TFORM", "a DjVu document", SAVE_AS_TEXT),
    (0, b"PK\3\4", "a zip archive", UNPACK),
    (0, b"PK\5\6", "an empty zip archive", NONE),
    (0, b"\xfd7zXZ\0", "an xz file", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\7", "a rar archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", UNPACK),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", UNPACK),
    (0, b"\x1f\x9d", "a file of compress", UNPACK),
    (0, b"\x1f\x8b", "a gzip file in a gzip file", UNPACK),
    (0, b"\x5d\0\0", "an lzma file", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x89PNG", "an image", NONE),
    (0, b"\xff\xd8\xff", "an image", NONE),
    (0, b"GIF8", "an image", NONE),
    (0, b"II*\0", "an image", NONE),
    (0, b"MM\0*", "an image", NONE),
    (8, b"WEBP", "an image", NONE),
    (0, b"RIFF", "a sound or video file", NONE),
    (0, b"OggS", "a sound file", NONE),
    (0, b"fLaC", "a sound file", NONE),
    (0, b"ID3", "a sound file", NONE),
    (4, b"ftyp", "a video or an image", NONE),
    (0, b"\x1aE\xdf\xa3", "a video", NONE),
    (0, b"\x7fELF", "a program", NONE),
    (0, b"MZ", "a program", NONE),
    (0, b"\xca\xfe\xba\xbe", "a program", NONE),
    (0, b"\xcf\xfa\xed\xfe", "a program", NONE),
    (0, b"\0asm", "a program", NONE),
    (0, b"SQLite format 3\0", "a database", NONE),
    (0, b"PAR1", "a table in Parquet format", SAVE_AS_TEXT),
    (0, b"\x93NUMPY", "an array of NumPy", NONE),
)
HEAD = 4096  # bytes of a file that kind_of needs


def reason_by_ending(name: str) -> str | None:
    """Why a file of this name is left out of a folder; None where it is read."""
    name = name.lower()
    if name.endswith(BACKUP_ENDINGS):  # nearly the same text twice, once perhaps in val
        return BACKUPS
    if name.endswith(".gz"):  # x.tar.gz is an archive, x.txt.gz is unpacked
        return _REASONS.get(".tar.gz") if name.endswith(".tar.gz") else None
    return _REASONS.get("." + name.rpartition(".")[2])


def kind_of(head: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, with advice ("" where there is none); None if nothing speaks against text."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    if head[:2] == b"PK" and (head[30:38] == b"mimetype" or b"[Content_Types].xml" in head[:2048]):
        return "a document of a word processor, in a zip archive", SAVE_AS_TEXT
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return "a bzip2 file", UNPACK
    for offset, signature, kind, advice in _SIGNATURES:
        certain = not signature.isalnum() or b"\0" in head
        if certain and head[offset : offset + len(signature)] == signature:
            return kind, advice
    return None


def advice_by_ending(name: str) -> str:
    """The advice for a binary file that its first bytes do not name."""
    reason = reason_by_ending(name) or ""
    return SAVE_AS_TEXT if reason.startswith("documents") else UNPACK if reason.startswith("archives") else NONE
