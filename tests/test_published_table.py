"""The published table of GANs and diffusion models, as data: well formed, and its figures those of the paper."""

import csv
import io
from importlib import resources

import pytest

COLUMNS = ["data_set", "resolution", "model", "kind", "fid", "sfid", "precision", "recall", "note"]
KINDS = {"GAN", "diffusion", "autoregressive", "VAE"}
NOTES = {"trained by the authors", "earlier paper", "two-resolution stack"}

# Rows, and the sums of FID, sFID, precision and recall, added up from a copy of the table typed on its own.
SUMS = {
    ("LSUN Bedrooms", 256): (5, 19.78, 36.15, 2.91, 2.46),
    ("LSUN Horses", 256): (3, 9.36, 19.21, 2.03, 1.58),
    ("LSUN Cats", 256): (3, 29.92, 25.42, 1.74, 1.43),
    ("ImageNet", 64): (4, 11.66, 15.81, 3.00, 2.36),
    ("ImageNet", 128): (5, 24.24, 24.40, 3.12, 2.10),
    ("ImageNet", 256): (8, 119.10, 54.99, 4.61, 3.78),
    ("ImageNet", 512): (4, 47.80, 34.56, 3.31, 1.78),
}


@pytest.fixture(scope="module")
def text() -> str:
    return (resources.files("ddpm_lib") / "datasets" / "dhariwal_nichol_2021.csv").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(text) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_line_has_every_column(text, rows):
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert all(line.count(",") == len(COLUMNS) - 1 for line in text.splitlines())
    assert text.endswith("\n")
    assert "\r" not in text
    assert all(value == value.strip() for row in rows for value in row.values())


def test_values_are_of_their_kind(rows):
    for row in rows:
        assert row["kind"] in KINDS
        assert set(row["note"].split("; ")) - {""} <= NOTES
        assert 0 < float(row["fid"]) < 100
        assert (row["sfid"] == "") == (row["precision"] == "") == (row["recall"] == "")
        if row["sfid"]:
            assert float(row["sfid"]) > 0
            assert 0 < float(row["precision"]) < 1
            assert 0 < float(row["recall"]) < 1


def test_no_model_stands_twice_in_a_data_set(rows):
    names = [(row["data_set"], row["resolution"], row["model"]) for row in rows]
    assert len(set(names)) == len(names) == 32


@pytest.mark.parametrize("data_set", SUMS)
def test_sums_are_those_of_the_paper(rows, data_set):
    own = [row for row in rows if (row["data_set"], int(row["resolution"])) == data_set]
    sums = (sum(float(row[c] or 0) for row in own) for c in ("fid", "sfid", "precision", "recall"))
    assert (len(own), *sums) == pytest.approx(SUMS[data_set])


def test_rows_that_the_text_speaks_of(rows):
    """Single rows, so that no two figures can be swapped unseen."""
    found = {
        (r["data_set"], r["resolution"], r["model"]): (r["fid"], r["sfid"], r["precision"], r["recall"]) for r in rows
    }
    assert found["LSUN Bedrooms", "256", "DDPM"] == ("4.89", "9.07", "0.60", "0.45")
    assert found["LSUN Bedrooms", "256", "StyleGAN"] == ("2.35", "6.62", "0.59", "0.48")
    assert found["LSUN Cats", "256", "DDPM"] == ("17.1", "12.4", "0.53", "0.48")
    assert found["ImageNet", "128", "LOGAN"] == ("3.36", "", "", "")
    assert found["ImageNet", "256", "BigGAN-deep"] == ("6.95", "7.36", "0.87", "0.28")
    assert found["ImageNet", "256", "ADM"] == ("10.94", "6.02", "0.69", "0.63")
    assert found["ImageNet", "512", "ADM"] == ("23.24", "10.19", "0.73", "0.60")
    assert found["ImageNet", "512", "ADM-G"] == ("7.72", "6.57", "0.87", "0.42")
