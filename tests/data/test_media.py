"""Columns of images are read without opening the files that they name."""

from datasets import Dataset, Features, Image, List, Value
from support.vision_models import picture

from star_dss_plugin.data.fingerprints import sample_of
from star_dss_plugin.data.media import undecoded


def test_columns_of_images_are_read_without_opening_files(tmp_path):
    missing = str(tmp_path / "nothing.png")
    features = Features({"images": List(Image()), "one": Image(), "text": Value("string")})
    row = {"images": [missing, missing], "one": missing, "text": "a"}
    data = Dataset.from_dict({k: [v, v] for k, v in row.items()}, features=features)
    closed = {"bytes": None, "path": missing}
    read = {"images": [closed, closed], "one": closed, "text": "a"}
    assert list(undecoded(data.select([1]))) == [read]
    assert len(sample_of(data)) == 64


def test_the_same_images_have_the_same_sample():
    one, two = (Dataset.from_list([{"images": [picture(7)]}]) for _ in range(2))
    assert sample_of(one) == sample_of(two)
    assert sample_of(one) != sample_of(Dataset.from_list([{"images": [picture(8)]}]))
