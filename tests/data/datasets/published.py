"""Small trees in the layouts in which data sets are published, with real media files."""

from __future__ import annotations

import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from cmkd_scale.data.audio import wav_bytes
from cmkd_scale.data.datasets import DatasetFactory
from cmkd_scale.data.datasets.ave import Ave
from cmkd_scale.data.datasets.crema_d import CremaD
from cmkd_scale.data.datasets.crisis_mmd import CrisisMmd
from cmkd_scale.data.datasets.csv_table import CsvTable
from cmkd_scale.data.datasets.folder import AudioFolder, ImageFolder
from cmkd_scale.data.datasets.fsdd import Fsdd
from cmkd_scale.data.datasets.ravdess import Ravdess
from cmkd_scale.data.datasets.vggsound import VggSound

RATE = 10  # pictures a second in a video
LEVEL = 20  # grey levels between a video's pictures


def sound(seed: int) -> bytes:
    """A short WAV, different for each seed."""
    return wav_bytes(np.random.default_rng(seed).uniform(-1, 1, 400).astype(np.float32), 8000)


def picture(seed: int, extension: str = "jpg") -> bytes:
    """A small picture, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@functools.lru_cache
def video(container: str = "mp4", seconds: float = 1.0, *, hertz: float | None = 500) -> bytes:
    """A video 64 x 48: picture i is grey ``LEVEL`` * i (modulo 240); a tone from 0.5 s on."""
    import av

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"clip.{container}"
        with av.open(path, "w") as out:
            pictures = out.add_stream("flv" if container == "flv" else "mpeg4", rate=RATE)
            pictures.width, pictures.height = 64, 48
            pictures.pix_fmt = "yuv420p"
            tone = out.add_stream("aac", rate=16000, layout="stereo") if hertz else None
            for i in range(round(seconds * RATE)):
                grey = np.full((48, 64, 3), i * LEVEL % 240, dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, RATE)
                out.mux(pictures.encode(frame))
            out.mux(pictures.encode(None))
            if tone is not None and hertz is not None:
                time = np.arange(round(seconds * 16000)) / 16000
                wave = (np.sin(2 * np.pi * hertz * time) * 0.5 * (time >= 0.5)).astype(np.float32)
                samples = av.AudioFrame.from_ndarray(np.stack([wave, wave]), "fltp", "stereo")
                samples.sample_rate, samples.pts = 16000, 0
                out.mux(tone.encode(samples))
                out.mux(tone.encode(None))
        return path.read_bytes()


def write(path: Path, content: bytes | str) -> None:
    """Make a file and the directories that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def fsdd_tree(root: Path) -> None:
    seed = itertools.count()
    for digit, speaker, index in itertools.product(range(10), ("george", "theo"), (0, 4, 5, 9, 10)):
        write(root / "recordings" / f"{digit}_{speaker}_{index}.wav", sound(next(seed)))
    write(root / "README.md", "not a recording")


def ravdess_tree(root: Path) -> None:
    for actor in range(1, 25):
        for channel, emotion in (("01", 1), ("01", 5), ("02", 4)):
            take = f"{channel}-{emotion:02d}-01-01-01-{actor:02d}"
            clip = sound(100 * actor + emotion)
            write(root / f"Actor_{actor:02d}" / f"03-{take}.wav", clip)
            videos = root / f"Video_Speech_Actor_{actor:02d}" / f"Actor_{actor:02d}"
            write(videos / f"01-{take}.mp4", video())
            write(videos / f"02-{take}.mp4", video(hertz=None))
        # The copy in another directory that some downloads have.
        again = f"Actor_{actor:02d}/03-01-05-01-01-01-{actor:02d}.wav"
        write(root / "audio_speech_actors_01-24" / again, (root / again).read_bytes())


def crema_d_tree(root: Path) -> None:
    for actor, emotion in itertools.product(range(1001, 1092), ("ANG", "SAD")):
        name = f"{actor}_DFA_{emotion}_XX"
        write(root / "AudioWAV" / f"{name}.wav", sound(2 * actor + (emotion == "SAD")))
        write(root / "VideoFlash" / f"{name}.flv", video("flv", hertz=None))
    write(root / "AudioWAV" / "1076_MTI_SAD_XX.wav", b"")


AVE_ROWS = {
    "trainSet.txt": [
        "Church bell&RUhOCu3LNXM&good&0&1",
        "Male speech, man speaking&-a_train&good&0&1",
        "Bark&twice&good&0&1",
        "Church bell&twice&good&1&2",
        "Bark&nothing&good&0&0",
        "Bark&shared&good&0&1",
        "Bark&gone&good&0&1",
    ],
    "valSet.txt": ["Bark&valid1&good&1&2", "Church bell&valid2&good&0&2"],
    "testSet.txt": ["Bark&test1&good&0&1", "Church bell&shared&good&1&2"],
}


def ave_tree(root: Path) -> None:
    rows = [row for of_split in AVE_ROWS.values() for row in of_split]
    header = "Category&VideoID&Quality&StartTime&EndTime"
    write(root / "Annotations.txt", "\n".join([header, *rows]) + "\n")
    for name, lines in AVE_ROWS.items():
        write(root / name, "\n".join(lines) + "\n")
    for row in rows:
        if "gone" not in row:
            write(root / "AVE" / f"{row.split('&')[1]}.mp4", video(seconds=2))


VGG_LABELS = ("people eating crisps, chips", "dog barking", "zebra braying")


def vggsound_tree(
    root: Path, labels: Sequence[str] = VGG_LABELS, clips_per_label: int = 20
) -> None:
    rows = []
    clips = len(labels) * clips_per_label
    for i in range(clips):
        label, split = labels[i % len(labels)], "test" if 3 * i >= 2 * clips else "train"
        quoted = f'"{label}"' if "," in label else label
        rows.append(f"-clip_{i:02d},{i},{quoted},{split}")
        if i % 10 != 9:
            write(root / "clips" / f"part{i % 2}" / f"-clip_{i:02d}_{i:06d}.mp4", video())
    write(root / "vggsound.csv", "\n".join(rows) + "\n")


CRISIS_COLUMNS = (
    "event_name\ttweet_id\timage_id\ttweet_text\timage\tlabel\tlabel_text\tlabel_image"
    "\tlabel_text_image"
)


def crisis_mmd_tree(root: Path) -> None:
    labels = ("affected_individuals", "not_humanitarian", "vehicle_damage")
    tables: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for i, lines in enumerate(6 * list(tables.values())):
        for number in range(2):  # two pictures of each tweet
            image = f"data_image/hurricane_maria/10_10_2017/{i}_{number}.jpg"
            write(root / "CrisisMMD_v2.0" / image, picture(10 * i + number))
            text = f'RT @x: "tweet {i} \N{HEAVY BLACK HEART}'
            of_text, of_image = labels[i // 3 % 2], labels[i // 3 % 2 + number]
            fields = ["hurricane_maria", f"{i}", f"{i}_{number}", text, image, of_text, of_text]
            lines.append("\t".join([*fields, of_image, "Positive"]))
    shared = tables["test"][0].replace("2_0\t", "2_7\t", 1)
    tables["train"].append(shared)  # a tweet that the test split shows
    for name, lines in tables.items():
        file = f"task_humanitarian_text_img_{name}.tsv"
        text = "\n".join([CRISIS_COLUMNS, *lines]) + "\n"
        write(root / "crisismmd_datasplit_all" / file, text)


def image_folder_tree(root: Path) -> None:
    seed = itertools.count()
    for split, label, i in itertools.product(("train", "val", "test"), ("cat", "dög"), range(8)):
        extension = ("jpg", "jpeg", "png", "webp")[i % 4]
        content = picture(next(seed), extension)
        write(root / split / label / f"{i}.{extension.upper()}", content)
    write(root / "train" / "cat" / "0.png", picture(1000, "png"))  # beside 0.JPG
    write(root / "train" / "cat" / ".hidden.jpg", b"")
    write(root / "train" / "cat" / "notes.txt", "no picture")


def audio_folder_tree(root: Path) -> None:
    for label, i in itertools.product(("bark", "meow"), range(60)):
        write(root / label / f"{i}.wav", sound(i + 100 * (label == "bark")))


def csv_tree(root: Path) -> None:
    lines = ["path,label,split,text"]
    array = io.BytesIO()
    np.save(array, np.arange(4, dtype=np.float32))
    for i in range(24):
        split, label = ("train", "dev", "test")[i % 3], ("a", "b", "")[i // 3 % 3]
        for name, content in (
            (f"pictures/{i}.jpg", picture(i)),
            (f"sounds/{i}.wav", sound(i)),
            (f"features/{i}.npy", array.getvalue()),
        ):
            write(root / name, content)
            lines.append(f"{name},{label},{split},")
        lines.append(f',{label},{split},"text {i},\nof two lines"')
    write(root / "table.csv", "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Case:
    """A data set, its class, and what makes its tree."""

    factory: DatasetFactory
    make: Callable[[Path], None]


CASES: dict[str, Case] = {
    "fsdd": Case(Fsdd, fsdd_tree),
    "ravdess": Case(Ravdess, ravdess_tree),
    "crema_d": Case(CremaD, crema_d_tree),
    "ave": Case(Ave, ave_tree),
    "vggsound": Case(VggSound, vggsound_tree),
    "crisis_mmd": Case(CrisisMmd, crisis_mmd_tree),
    "image_folder": Case(ImageFolder, image_folder_tree),
    "audio_folder": Case(AudioFolder, audio_folder_tree),
    "csv": Case(CsvTable, csv_tree),
}
