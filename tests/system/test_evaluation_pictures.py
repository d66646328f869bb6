"""Which pictures are measured, in what order, and what becomes of those that cannot be."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from two_processes import in_two_processes

from tim.evaluation import features
from tim.evaluation.features import Features, measure, work_folder
from tim.evaluation.pictures import Bad, Folder, Npz, Stream, opened
from tim.processes import launched_group


def random_pictures(count, height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, 0.png to 11.png."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for number, picture in enumerate(random_pictures(12)):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


class Means:
    """Features (N, 3): the mean level of each channel."""

    def __init__(self, name="means"):
        self.name, self.batches = name, []

    def __call__(self, pictures):
        self.batches.append(len(pictures))
        return Features(pictures.float().mean((2, 3)))


def measured(pictures, network=None, work=None, **options):
    with work_folder(work) as folder:
        found = measure(pictures, network or Means(), folder, **options)
        return found, found.joined()


def means(pictures):
    return torch.from_numpy(pictures).float().mean((1, 2))


def test_a_folder_is_read_in_numeric_order(folder):
    (folder / "deep").mkdir()
    (folder / ".hidden").mkdir()
    for name in ("deep/2.PNG", "deep/10.Png", ".hidden/0.png", "._3.png"):
        Image.fromarray(random_pictures(1)[0]).save(folder / name, format="PNG")
    (folder / "run.json").write_text("{}")
    pictures = Folder(folder)
    assert pictures.names == [*(f"{n}.png" for n in range(12)), "deep/2.PNG", "deep/10.Png"]
    levels = torch.stack(list(pictures.read(range(12)))).permute(0, 2, 3, 1)
    assert torch.equal(levels, torch.from_numpy(random_pictures(12)))


def test_what_is_no_picture_is_said(folder, caplog):
    (folder / "notes.txt").write_text("")
    assert len(Folder(folder).names) == 12
    assert "not pictures: notes.txt" in caplog.text


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_read_row_by_row(tmp_path, compressed):
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "samples.npz", arr_0=random_pictures(12), mu=np.zeros(3))
    pictures = Npz(tmp_path / "samples.npz")
    assert len(pictures.names) == 12
    chosen = [1, 2, 7, 11]
    levels = torch.stack(list(pictures.read(chosen))).permute(0, 2, 3, 1)
    assert torch.equal(levels, torch.from_numpy(random_pictures(12))[chosen])


def test_a_reference_file_of_the_suite_s_kind_is_streamed():
    path = GOLDEN / "evaluation/reference.npz"
    levels = torch.stack(list(Npz(path).read(range(12)))).permute(0, 2, 3, 1)
    with np.load(path) as arrays:
        assert torch.equal(levels, torch.from_numpy(arrays["arr_0"])) and len(levels) == 12


def test_an_npz_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match="holds no arr_0"):
        Npz(path)
    for wrong in (random_pictures(2).astype(np.float32), random_pictures(2)[..., :1]):
        np.savez(path, arr_0=wrong)
        with pytest.raises(ValueError, match="must be uint8"):
            Npz(path)
    np.savez(path, arr_0=np.asfortranarray(random_pictures(2)))
    with pytest.raises(ValueError, match="by columns"):
        Npz(path)
    np.savez(path, arr_0=random_pictures(2))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        Npz(path)


def test_a_damaged_npz_is_an_error(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez(path, arr_0=random_pictures(12, 64, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "arr_0.npy"
    with pytest.raises(OSError, match="CRC"):
        list(Npz(path).read(range(12)))


def test_a_stream_gives_pictures_and_batches():
    levels = torch.from_numpy(random_pictures(12)).permute(0, 3, 1, 2)
    pictures = Stream([levels[0], levels[1:9], levels[9:]], 11)
    found, rows = measured(pictures, batch_size=5)
    assert found.names[-1] == "picture 10" and torch.equal(rows, means(random_pictures(12))[:11])
    with pytest.raises(ValueError, match="fewer pictures than asked: 13 are needed"):
        measured(Stream(iter(levels), 13))
    with pytest.raises(ValueError, match="must be uint8"):
        measured(Stream([levels.float()], 3))


def test_features_depend_neither_on_batches_nor_on_the_door(folder, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=random_pictures(12))
    expected = means(random_pictures(12))
    for pictures in (Folder(folder), Npz(tmp_path / "samples.npz")):
        for batch_size in (1, 5, 64):
            assert torch.equal(measured(pictures, batch_size=batch_size)[1], expected)


def test_pictures_of_several_sizes_are_measured(folder):
    Image.fromarray(random_pictures(1, 9, 4, seed=1)[0]).save(folder / "5.png")
    network = Means()
    _, rows = measured(Folder(folder), network, batch_size=4)
    assert network.batches == [4, 1, 1, 4, 2]
    assert torch.equal(rows[5:6], means(random_pictures(1, 9, 4, seed=1)))


def spoil(folder):
    """Half a PNG, a grey picture, one with transparency; their names."""
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    for name, mode in (("4.png", "L"), ("7.png", "RGBA")):
        Image.open(folder / name).convert(mode).save(folder / name)


def test_bad_pictures_are_refused_by_name_and_count(folder):
    spoil(folder)
    with pytest.raises(ValueError, match="3 of 12 pictures cannot be measured") as refused:
        measured(Folder(folder))
    for part in ("3.png (", "truncated", "4.png (it is L, not RGB)", "7.png (it is RGBA, not RGB)"):
        assert part in str(refused.value)


def test_bad_pictures_are_left_out_when_told_to(folder):
    spoil(folder)
    found, rows = measured(Folder(folder), leave_out=True)
    kept = [n for n in range(12) if n not in (3, 4, 7)]
    assert found.names == [f"{n}.png" for n in kept]
    assert [bad.name for bad in found.bad] == ["3.png", "4.png", "7.png"]
    assert torch.equal(rows, means(random_pictures(12))[kept])


def test_grey_and_transparent_pictures_become_rgb_when_told_to(folder):
    spoil(folder)
    found, rows = measured(Folder(folder, convert=True), leave_out=True)
    assert [bad.name for bad in found.bad] == ["3.png"]
    assert torch.equal(rows[6], means(random_pictures(12))[7])
    assert rows[3].unique().numel() == 1  # grey
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "4.png")  # 16 bits do not fit
    assert [bad.name for bad in measured(Folder(folder, convert=True), leave_out=True)[0].bad] == [
        "3.png", "4.png"
    ]  # fmt: skip


def test_features_that_are_not_finite_are_bad(folder):
    def network(pictures):
        pool = pictures.float().mean((2, 3))
        return Features(pool, logits=torch.where(pool.argmax(1, True) == 0, torch.nan, pool))

    with pytest.raises(ValueError, match=r"png \(its features are not finite\)"):
        measured(Folder(folder), network)
    found, rows = measured(Folder(folder), network, leave_out=True)
    assert (rows.argmax(1) != 0).all() and len(rows) + len(found.bad) == 12
    with pytest.raises(ValueError, match="none of 12 pictures can be measured"):
        measured(
            Folder(folder), lambda p: Features(p.float()[:, :, 0, 0] * torch.nan), leave_out=True
        )


def test_a_network_that_loses_rows_is_refused(folder):
    with pytest.raises(ValueError, match="rows of 12 pictures"):
        measured(Folder(folder), lambda pictures: Features(torch.ones(3, 2)))


def test_too_few_and_none_at_all(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        opened(tmp_path / "empty", 1)
    with pytest.raises(FileNotFoundError, match="see docs/evaluation.md"):
        opened(tmp_path / "nowhere", 1)
    with pytest.raises(FileNotFoundError, match="see docs/evaluation.md"):
        opened(tmp_path / "nowhere.npz", 1)
    with pytest.raises(ValueError, match="fewer pictures than asked: .* holds 12 of 13"):
        opened(folder, 13)


def test_statistics_of_many_pictures_show_their_progress(folder, monkeypatch, capsys):
    for chunk, is_shown in ((500, False), (1, True)):
        monkeypatch.setattr(features, "CHUNK", chunk)
        with work_folder(None) as work:
            measure(Folder(folder), Means(), work).moments()
        assert ("statistics: 100%" in capsys.readouterr().err) is is_shown


def test_a_rerun_measures_what_is_missing_or_changed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 5)
    work = tmp_path / "work"
    first = measured(Folder(folder), work=work)[1]
    again = Means()
    assert torch.equal(measured(Folder(folder), again, work=work)[1], first)
    assert again.batches == []
    Image.fromarray(random_pictures(1, seed=2)[0]).save(folder / "6.png")
    os.utime(folder / "6.png", ns=(1, 1))
    rows = measured(Folder(folder), again, work=work)[1]
    assert again.batches == [5] and torch.equal(rows[6], means(random_pictures(1, seed=2))[0])
    other = Means("another network")
    measured(Folder(folder), other, work=work)
    assert sum(other.batches) == 12
    assert not [path for path in work.iterdir() if path.suffix != ".safetensors"]


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 5)

    class Stops(Means):
        def __call__(self, pictures):
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().__call__(pictures)

    with pytest.raises(KeyboardInterrupt):
        measured(Folder(folder), Stops(), work=tmp_path / "work")
    rest = Means()
    rows = measured(Folder(folder), rest, work=tmp_path / "work")[1]
    assert rest.batches == [2] and torch.equal(rows, means(random_pictures(12)))


def test_nothing_is_kept_of_what_has_no_name(folder, tmp_path):
    network = Means(None)
    for _ in range(2):
        measured(Folder(folder), network, work=tmp_path / "work")
    levels = torch.from_numpy(random_pictures(12)).permute(0, 3, 1, 2)
    measured(Stream(levels, 12), Means(), work=tmp_path / "work")
    assert network.batches == [12, 12] and not list((tmp_path / "work").iterdir())


def test_two_processes_share_the_pictures(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 5)
    spoil(folder)

    def run(rank, output):
        network = Means()
        with launched_group():
            found, rows = measured(Folder(folder), network, work=output / "work", leave_out=True)
            without = measured(Folder(folder), Means(None), leave_out=True)[1]
        torch.save((rows, without, found.bad), output / ("found.pt" if rank == 0 else "other.pt"))
        (output / f"{rank}.json").write_text(json.dumps(network.batches))

    in_two_processes(tmp_path, run)
    expected, rows = measured(Folder(folder), leave_out=True)
    for name in ("found.pt", "other.pt"):
        found = torch.load(tmp_path / name, weights_only=False)
        assert torch.equal(found[0], rows) and torch.equal(found[1], rows)
        assert found[2] == expected.bad and isinstance(found[2][0], Bad)
    shares = [sum(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(2)]
    assert shares == [3 + 2, 4]
