"""Reading the user's text: which files of a folder, in which encoding, from which kinds of pipes, and what the messages
advise. The advice is followed and must work."""

import bz2
import gzip
import io
import lzma
import os
import random
import shlex
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

from errors import UserError
from prepare_data import PrepareOptions
from prepare_data.__main__ import main
from prepare_data.pipeline import make_corpus
from prepare_data.sources import documents, encodings, pipes, text
from prepare_data.sources.encodings import Encoding, detect
from tests.conftest import ROOT

ENGLISH = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
FRENCH = "Été comme hiver, l’élève préféré du maître était là, près de la fenêtre ; « ça va », dit-il — déjà !\n"
GERMAN = "„Schöne Grüße“, schrieb Müller – und fügte später hinzu, daß alles in Ordnung wäre.\n"
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy, a všichni se tomu smáli až do večera.\n"
POLISH = "Zażółć gęślą jaźń, powiedział, a wszyscy się śmiali; źródło było już blisko.\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
GREEK = "Άνδρα μοι έννεπε, Μούσα, πολύτροπον, ος μάλα πολλά πλάγχθη.\n"
CHINESE = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n"
TAIWAN = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
KOREAN = "나 보기가 역겨워 가실 때에는 말없이 고이 보내 드리오리다.\n"

FILES = {  # name: (text, encoding that it is stored in)
    "french": (FRENCH * 5, "cp1252"),
    "german": (GERMAN * 5, "cp1252"),
    "latin-1": ("Çà et là, l'élève était déjà près de la fenêtre.\n" * 5, "latin-1"),
    "latin-9": ("Le cœur de l'œuvre coûte dix mille francs à Noël.\n" * 5, "iso8859-15"),
    "mac": (FRENCH * 5, "mac-roman"),
    "dos": ("Fräulein Müller aß später schöne Brötchen.\n" * 5, "cp850"),
    "czech": (CZECH * 5, "cp1250"),
    "polish": (POLISH * 5, "iso8859-2"),
    "russian": (RUSSIAN * 5, "cp1251"),
    "russian_unix": (RUSSIAN * 5, "koi8-r"),
    "russian_dos": (RUSSIAN * 5, "cp866"),
    "greek": (GREEK * 5, "cp1253"),
    "chinese": (CHINESE * 5, "gb18030"),
    "taiwan": (TAIWAN * 5, "big5"),
    "japanese": (JAPANESE * 5, "shift_jis"),
    "japanese_unix": (JAPANESE * 5, "euc_jp"),
    "japanese_mail": (JAPANESE * 5, "iso2022_jp"),
    "korean": (KOREAN * 5, "euc_kr"),
    "utf16": (FRENCH, "utf-16"),
    "utf16_be": (RUSSIAN, "utf-16-be"),
    "utf16_chinese": (CHINESE, "utf-16-le"),
    "utf32": (FRENCH, "utf-32"),
    "utf32_le": (FRENCH, "utf-32-le"),
    "utf8": (GERMAN + CHINESE + RUSSIAN, "utf-8"),
    "utf8_marked": (GERMAN, "utf-8-sig"),
    "ascii": (ENGLISH, "ascii"),
    "one_quote": (ENGLISH * 70 + "I don’t know.\n" + ENGLISH * 70, "cp1252"),
    "one_quote_mac": (ENGLISH * 70 + "I don’t know.\n" + ENGLISH * 70, "mac-roman"),
    "quotes": ("“Well,” said he — “I don’t know…”\n" * 40, "cp1252"),
}
COMMAND = [sys.executable, "-m", "prepare_data", "text", "--tokenizer=bytes"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(source, encoding="utf-8", **options):
    return "".join(piece for piece, _ in text.corpus(source, encoding, **options).pieces())


def notes(source, encoding="utf-8", **options):
    corpus = text.corpus(source, encoding, **options)
    list(corpus.pieces())
    return "\n".join(corpus.notes)


def refused(source, encoding="utf-8", **options):
    with pytest.raises(UserError) as caught:
        read(source, encoding, **options)
    return str(caught.value)


def flags(message, name):
    """The values of a flag in a message, as a shell would pass them on."""
    commands = message[message.index("--") :]
    words = shlex.split(commands.replace("\n", " ").replace(",", " "))
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]


def write(files):
    for name, content in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())


# Encodings


@pytest.mark.parametrize("name", FILES)
def test_the_advice_for_an_encoding_gives_back_the_text(name):
    content, encoding = FILES[name]
    write({"in.txt": content.encode(encoding)})
    assert read("in.txt", "auto") == content
    if encoding in ("utf-8", "utf-8-sig", "ascii"):
        return
    if encoding == "iso2022_jp":  # ASCII characters only, so UTF-8 too
        assert "look like iso2022_jp, but are read as utf-8 (try --encoding=auto): 1 (in.txt)" in notes("in.txt")
        return
    message = refused("in.txt")
    assert message.startswith("in.txt: not utf-8: byte 0x")
    advised = flags(message, "encoding")
    assert "auto" in advised
    assert [read("in.txt", other) for other in advised] == [content] * 2
    shown = message.splitlines()[1].strip()
    assert shown in content
    assert len(shown) > 5


def test_a_folder_of_many_encodings_is_read_file_by_file():
    write({f"in/{name}.txt": content.encode(encoding) for name, (content, encoding) in FILES.items()})
    assert read("in", "auto") == "".join(FILES[name][0] for name in sorted(FILES, key=lambda name: f"{name}.txt"))
    note = notes("in", "auto")
    assert "utf-8 3 (in/ascii.txt, in/utf8.txt, in/utf8_marked.txt)" in note
    assert "gb18030 1 (in/chinese.txt)" in note
    message = refused("in")
    assert message.count("not utf-8: byte 0x") == 3, "the first three are named"
    assert "more of 29 files" in message
    assert flags(message, "encoding") == ["auto"], "no single encoding reads them all"


def test_an_encoding_is_advised_for_a_folder_only_if_all_files_read_well_in_it():
    write({"in/a.txt": FRENCH.encode("cp1252"), "in/b.txt": ENGLISH, "in/c.txt": GERMAN.encode("cp1252")})
    assert flags(refused("in"), "encoding") == ["cp1252", "auto"]
    write({"in/d.txt": GERMAN})
    assert flags(refused("in"), "encoding") == ["auto"]
    assert "files valid UTF-8, but read as cp1252 (try --encoding=auto): 1 (in/d.txt)" in notes("in", "cp1252")


def test_latin_1_where_cp1252_is_meant_is_noted():
    write({"in.txt": FRENCH.encode("cp1252")})
    assert "files with control characters when read as latin-1 (try --encoding=auto): 1 (in.txt)" in notes(
        "in.txt", "latin-1"
    )
    assert notes("in.txt", "cp1252") == ""


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "cp932"])
def test_a_file_that_ends_in_the_middle_of_a_character(encoding):
    content = JAPANESE * 20
    write({"in.txt": content.rstrip().rstrip("。").encode(encoding)[:-1]})
    message = refused("in.txt", encoding)
    assert f"ends in the middle of a character of {encoding}: it was cut short" in message
    assert flags(message, "encoding") == ["auto"]
    assert content.startswith(read("in.txt", "auto"))
    assert "in.txt: ends in the middle of a character, which was left out" in notes("in.txt", "auto")


def test_a_text_whose_only_special_character_is_the_last():
    for content in ("Un café", "viel Spaß"):
        write({"in.txt": content.encode("cp1252")})
        assert flags(refused("in.txt"), "encoding") == ["cp1252", "auto"]
        assert read("in.txt", "auto") == content


def test_utf8_with_a_few_other_bytes_is_not_taken_for_another_encoding():
    good = GERMAN * 20
    write({"in.txt": good.encode() + "don’t – Müller\n".encode("cp1252") + good.encode()})
    message = refused("in.txt")
    assert "byte 0x92 in line 21" in message
    assert "as cp1252 such bytes (3) read" in message
    assert flags(message, "encoding") == ["auto"]
    assert read("in.txt", "auto") == good + "don’t – Müller\n" + good
    assert "in.txt: bytes that are not UTF-8 were read as cp1252: 3" in notes("in.txt", "auto")


def test_what_is_not_text_has_no_encoding():
    samples = [bytes(range(256)) * 20, random.Random(0).randbytes(4000), b"\x00\x01\x02\x03" * 500]
    samples += [b"".join((7 * i * i % 50_000).to_bytes(2, "little") for i in range(3000))]  # uint16 token ids
    for data in samples:
        assert detect(io.BytesIO(data)) is None
        write({"in.dat": data})
        for encoding in ("utf-8", "auto"):
            assert refused("in.dat", encoding).startswith("in.dat: is not text in any encoding: a binary file")
    write({"in.txt": GERMAN * 3 + "\0" + GERMAN})
    assert "a binary file, or damaged at byte 0x00 in line 4 (byte offset" in refused("in.txt", "auto")


@pytest.mark.parametrize("content", [FRENCH, GERMAN, CZECH, RUSSIAN, CHINESE, KOREAN])
def test_no_encoding_is_found_that_gives_control_characters(content):
    for encoding in ("cp1252", "cp1250", "mac-roman", "cp850", "cp1251", "koi8-r", "gb18030", "cp949", "latin-1"):
        for size in (40, 80, 400):
            data = (content * 10).encode(encoding, "ignore")[:size]
            found = detect(io.BytesIO(data))
            if found and not found.cut_short:
                decoded = found.decode(data)
                assert not any("\x80" <= char <= "\x9f" for char in decoded)
                assert found.stray or decoded.encode(found.name) == data


def test_the_sample_of_a_large_file_spans_it(monkeypatch):
    monkeypatch.setattr(encodings, "CHUNK", 3001)
    for name in ("czech", "chinese", "japanese", "russian", "one_quote", "utf16_be"):
        content, encoding = FILES[name]
        long = ENGLISH * 200 + content * 40 + (content * 40).replace("\n", "")
        assert detect(io.BytesIO(long.encode(encoding))) == detect(io.BytesIO(content.encode(encoding)))


def test_ascii_and_empty_files_are_utf8():
    assert detect(io.BytesIO(b"plain")) == Encoding("utf-8", ascii=True)
    assert detect(io.BytesIO(b"")) == Encoding("utf-8", ascii=True)


@pytest.mark.parametrize(
    "name", ["hex", "rot13", "base64", "zlib", "idna", "utf-7", "punycode", "unicode_escape", "x\0y"]
)
def test_names_that_are_no_text_encodings_are_refused(name):
    write({"in.txt": ENGLISH})
    message = refused("in.txt", name)
    assert "not a text encoding" in message
    assert f"did you mean {name.replace('-', '')}" not in message
    assert "did you mean utf" in refused("in.txt", "utf_88")


# Kinds of files


def archive(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.txt", ENGLISH)
    elif kind in ("docx", "odt"):
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("[Content_Types].xml" if kind == "docx" else "mimetype", "application/x")
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if kind == "tgz" else "w") as packed:
            packed.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return file.getvalue()


KINDS = {
    "a.zip": (archive("zip"), "unpack"),
    "a.tar": (archive("tar"), "unpack"),
    "a.tgz": (archive("tgz"), "unpack"),
    "a.txt.xz": (lzma.compress(ENGLISH.encode()), "unpack"),
    "a.txt.bz2": (bz2.compress(ENGLISH.encode()), "unpack"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "unpack"),
    "a.docx": (archive("docx"), "save it as plain text"),
    "a.odt": (archive("odt"), "save it as plain text"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", "save it as plain text"),
    "a.pdf": (b"%PDF-1.7\n1 0 obj\n", "save it as plain text"),
    "a.rtf": (rb"{\rtf1\ansi{\fonttbl\f0 Arial;}Hello\par}", "save it as plain text"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0", "expected plain text"),
    "a.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "expected plain text"),
    "a.exe": (b"MZ\x90\0\3\0\0\0", "expected plain text"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_not_plain_text_gets_the_advice_that_helps(name):
    data, advice = KINDS[name]
    write({name: data, "as text.txt": data, f"in/{name}": data, "in/ok.txt": ENGLISH, "mixed/ok.txt": ENGLISH})
    assert advice in refused(name)
    assert advice in refused("as text.txt"), "the content decides, not the name"
    assert read("in") == ENGLISH
    assert f"1 ({name})" in notes("in")
    write({"mixed/looks like text.md": data})
    message = refused("mixed")
    assert "mixed/looks like text.md: is " in message
    assert read("mixed", exclude=flags(message, "exclude")) == ENGLISH


def test_text_that_begins_like_a_binary_format_is_text():
    for begin in ("MZ is a symbol", "PK", "BZh and bzip2", "RIFF", "OggS", "GIF89a is a format", "ID3 tags", "%!PS"):
        write({"in.txt": begin + "\n" + ENGLISH})
        assert read("in.txt") == begin + "\n" + ENGLISH


def test_gzip_files_are_unpacked():
    write({"in/a.txt.gz": gzip.compress(FRENCH.encode("cp1252")), "in/b.tar.gz": archive("tgz")})
    assert read("in", "auto") == FRENCH
    assert "archives (unpack them to use them): 1 (b.tar.gz)" in notes("in", "auto")


# Folders and globs


def test_all_that_is_left_out_is_counted_and_named(folder):
    write({f"in/{name}": b"\0" for name in ("a.PNG", "b.mp3", "c.bin", "d.npy")})
    write({"in/ok.txt": "ok", "in/sub/two.md": "two", "in/empty.txt": "", "in/.hidden": "x", "in/.git/config": "x"})
    write({"in/node_modules/x.js": "x", "in/book.pdf": "%PDF", "in/z.zip": "PK", "in/data/d/dataset.json": "{}"})
    write({"in/drafts/one.txt": "no", "in/late.log": "no", "elsewhere/secret.txt": "secret"})
    os.symlink(folder / "elsewhere", "in/out")
    os.symlink(folder / "in", "in/loop")
    os.symlink("nowhere", "in/broken")
    os.symlink("ok.txt", "in/same.txt")
    if hasattr(os, "mkfifo"):
        os.mkfifo("in/pipe")
    exclude = ("drafts/", "*.log", "*.nothing")
    assert list(text.corpus("in", exclude=exclude).pieces()) == [("ok", True), ("two", True)]
    note = notes("in", exclude=exclude)
    for line in (
        "skipped images, sound, programs, model weights and other binary files: 4 (a.PNG, b.mp3, c.bin, …)",
        "skipped documents that are not plain text (save them as text to use them): 1 (book.pdf)",
        "skipped archives (unpack them to use them): 1 (z.zip)",
        "skipped hidden files and folders: 2 (.git, .hidden)",
        "skipped folders of packages and caches: 1 (node_modules)",
        "skipped folders that Sprout wrote: 1 (data/d)",
        "skipped empty files: 1 (empty.txt)",
        "skipped files and folders by --exclude: 2 (drafts, late.log)",
        "--exclude=*.nothing matches nothing",
    ):
        assert line in note.splitlines()
    assert "skipped symbolic links within the folder, or to nothing: 3 (loop, broken, same.txt)" in note
    assert "skipped symbolic links that lead out of the folder (--follow_links follows them): 1 (out)" in note
    assert ("pipes, sockets and devices: 1 (pipe)" in note) == hasattr(os, "mkfifo")


def test_files_of_white_space_are_named():
    write({"in/ok.txt": "ok", "in/mark.txt": b"\xef\xbb\xbf", "in/lines.txt": " \r\n\n"})
    assert read("in") == "ok"
    assert "skipped files of nothing but white space: 2 (in/lines.txt, in/mark.txt)" in notes("in")


def test_an_absolute_path_excludes(folder):
    write({"in/ok.txt": "ok", "in/no.txt": "no", "in/sub/no.txt": "no"})
    exclude = (str(folder / "in" / "no.txt"), f"{folder / 'in' / 'sub'}{os.sep}")
    assert read("in", exclude=exclude) == "ok"
    assert "matches nothing" not in notes("in", exclude=exclude)


@pytest.mark.skipif(os.name != "posix", reason="Windows refuses such names")
def test_control_characters_of_names_do_not_reach_messages():
    write({"in/ok.txt": "ok", "in/new\nline\x1b[31m.png": "x", "in/bad\nname.txt": b"a\0b"})
    assert "bad\ufffdname.txt: " in refused("in").splitlines()[0]
    assert "1 (new\ufffdline\ufffd[31m.png)" in notes("in", exclude=("bad*",))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="this user may read everything")
def test_what_may_not_be_read_is_named():
    write({"in/ok.txt": "ok", "in/private/a.txt": "no", "in/secret.txt": "no"})
    os.chmod("in/private", 0)
    os.chmod("in/secret.txt", 0)
    assert read("in") == "ok"
    assert "skipped files and folders that this user may not read: 2 (private, secret.txt)" in notes("in")
    os.chmod("in/private", 0o700)
    assert "secret.txt: cannot be read" in refused("in/secret.txt")


def test_an_unreadable_subfolder_is_named(monkeypatch):
    write({"in/ok.txt": "ok", "in/private/a.txt": "no"})
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("private"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for source in ("in", "in/**/*.txt"):
        assert read(source) == "ok"
        assert "skipped files and folders that this user may not read: 1 (private)" in notes(source)


def test_a_folder_without_text_says_what_it_holds():
    write({"in/a.png": "x", "in/.b": "x", "in/c.docx": "x"})
    message = refused("in")
    assert message.startswith("in: contains no text files\n")
    assert "a.png" in message
    assert "save them as text to use them): 1 (c.docx)" in message
    assert "by --exclude: 1 (x.txt)" in refused_file("x.txt", exclude=["*.txt"])


def refused_file(name, **options):
    write({name: ENGLISH})
    return refused(name, **options)


def test_globs_follow_links_to_files_and_enter_no_loop(folder):
    write({"in/a.txt": "A", "in/b.md": "B", "in/sub/c.txt": "C", "in/sub/.d.txt": "D", "elsewhere/e.txt": "E"})
    os.symlink(folder / "in", "in/loop")
    os.symlink("sub/c.txt", "in/e.txt")
    os.symlink(folder / "elsewhere" / "e.txt", "in/f.txt")
    assert read("in/*.txt") == "AC"
    assert "links that lead out of the folder (--follow_links follows them): 1 (f.txt)" in notes("in/*.txt")
    assert read("in/*.txt", follow_links=True) == "ACE"
    assert read("in/**/*.txt") == "ACC"
    assert read("in/**") == "ABCC"
    assert read(f"{folder}/i?/*/c.txt") == "C"
    assert "folders that the glob matches (** instead of * enters folders): 2 (loop, sub)" in notes("in/*")
    assert "sub" not in notes("in/*.txt")
    assert "no such file" in refused("in/*.nothing")


def test_links_out_of_a_folder_are_followed_once_where_that_is_asked_for(folder):
    write({"in/a.txt": "A", "out/b.txt": "B", "out/sub/c.txt": "C", "d.txt": "D"})
    for target, name in (("out", "x"), ("out", "y"), ("out/sub", "z"), (".", "parent"), ("d.txt", "d.txt")):
        os.symlink(folder / target, f"in/{name}")
    os.symlink(folder / "in", "out/back")
    os.symlink("sub", "out/again")
    os.symlink("in", "named")
    assert read("named") == "A"
    assert read("named", follow_links=True) == read("in", follow_links=True) == "ADBC"
    assert "symbolic links to what another one leads to: 4 (parent, y, z, …)" in notes("in", follow_links=True)


NAMES = ("it's [a].txt", "a b.log", "-n.txt", "x[1-9].csv", "*.txt", "#.txt", "$HOME.txt", "é.txt")


@pytest.mark.parametrize("name", [name for name in NAMES if os.name == "posix" or "*" not in name])
def test_the_advice_to_leave_a_file_out_works_for_any_name(name):
    write({f"in/sub/{name}": b"\0\1\2" * 50, "in/ok.md": "ok", "in/sub/fine.log2": "+"})
    assert read("in", exclude=flags(refused("in"), "exclude")) == "ok+"
    assert read("in", exclude=[f"in/sub/{name}"]) == "ok+", "the path as messages show it"


def test_many_binary_files_are_left_out_by_their_ending():
    write({f"in/{i}.dat": b"\0\1\2" * 50 for i in range(30)})
    write({"in/a.txt": "a", "in/b.txt": b"\0\1", "in/c.txt": b"\0\1"})
    message = refused("in")
    assert "and 29 more of 33 files" in message
    assert flags(message, "exclude") == ["*.dat", "b.txt", "c.txt"]
    assert read("in", exclude=flags(message, "exclude")) == "a"


def test_backups_are_left_out_of_a_folder():
    write({"in/a.txt": "a", "in/a.txt~": "b", "in/a.txt.bak": "c", "in/Desktop.ini": "d", "in/settings.ini": "e"})
    corpus = text.corpus("in")
    assert "".join(piece for piece, _ in corpus.pieces()) == "ae"
    assert any("left there: 3 (Desktop.ini, a.txt.bak, a.txt~)" in note for note in corpus.notes)
    assert read("in/a.txt~") == "b", "a file that is named directly is read"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode on this system")
def test_a_name_that_is_not_utf8(folder):
    name = os.fsdecode("Café".encode("latin-1") + b".txt")
    write({name: ENGLISH, f"in/{name}": b"\0\1\2" * 50, "in/ok.txt": ENGLISH})
    assert text.corpus(name).name == "Café"
    assert text.corpus(name).origin == "Caf�.txt"
    assert read("in", exclude=flags(refused("in"), "exclude")) == ENGLISH
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*COMMAND, f"--input={name}"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (folder / "data" / "Café" / "dataset.json").is_file()


def test_the_options_reach_the_corpus():
    write({"in/a.txt": FRENCH.encode("cp1252"), "in/b.log": "no"})
    options = PrepareOptions(encoding="auto", exclude=("*.log",))
    assert [piece for piece, _ in make_corpus("text", "in", options).pieces()] == [FRENCH]


# Pipes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_read_once_and_can_be_used_repeatedly(folder):
    os.mkfifo("novel.txt")
    writer = threading.Thread(target=(folder / "novel.txt").write_bytes, args=(gzip.compress(FRENCH.encode()),))
    writer.start()
    corpus = text.corpus("novel.txt")
    writer.join()
    assert corpus.name == "novel"
    assert list(corpus.pieces()) == list(corpus.pieces()) == [(FRENCH, True)]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no <(command) on this system")
def test_the_output_of_a_command(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{shlex.join(COMMAND)} --name=d --input=<(printf 'A man, a plan, a canal: %.0s' 1 2 3 4 5 6 7 8 9)"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 document, 216 bytes" in done.stdout
    assert text.name_of("/dev/fd/63") is None


def test_a_device_is_refused():
    if os.path.exists("/dev/zero"):
        assert "is a device" in refused("/dev/zero")


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
def test_standard_input_that_is_closed(monkeypatch, source):
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(source) == "standard input: is closed; pipe a text in, or name a file"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # like os.devnull, which start_script puts there
    assert refused(source) == "standard input: is empty or closed; pipe a text in, or name a file"


def test_a_full_temporary_folder_is_one_clear_error(monkeypatch):
    class Full(io.RawIOBase):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipes, "IN_MEMORY", 100)
    monkeypatch.setattr(pipes.tempfile, "TemporaryFile", lambda **options: Full())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ENGLISH.encode() * 10)))
    with pytest.raises(UserError, match=r"no room for a copy of standard input.*No space left on device.*set TMPDIR"):
        main(["text", "--input=-", "--name=d"])


@pytest.mark.skipif(os.name != "posix", reason="needs limits of file sizes")
def test_a_small_temporary_folder_for_real(monkeypatch):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "from prepare_data.sources import pipes; pipes.IN_MEMORY = 1000;"
        "from errors import run_script; run_script(lambda: pipes.spooled('-') and 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"x" * 3_000_000, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert b"set TMPDIR to a folder with more space" in done.stderr
    assert done.stderr.count(b"\n") == 1


# Line ends


def test_documents_of_a_windows_file_do_not_end_in_a_carriage_return():
    lines = "one\r\ntwo\r\n\r\nthree\nfour\rfive"
    for size in range(1, len(lines) + 1):
        chunks = [lines[i : i + size] for i in range(0, len(lines), size)]
        assert list(documents(chunks, "\n")) == [("one", True), ("two", True), ("three", True), ("four\rfive", True)]
        assert list(documents(chunks, "\r\n")) == list(documents(chunks, "\n"))
        assert list(documents(chunks, "\n\n")) == [("one\r\ntwo", True), ("three\nfour\rfive", True)]
        assert list(documents(chunks, "\r")) == [(part, True) for part in ("one", "\ntwo", "\nthree\nfour", "five")]
        assert list(documents(chunks, None)) == [(lines, True)], "line ends within documents are kept"
