"""Columns of images are read without opening the files that they name."""

import pytest
from datasets import Dataset, Features, Image, List, Value
from support.vision_models import picture

from star_dss_plugin.data.fingerprints import dataset_hash, sampled_rows_hash
from star_dss_plugin.data.media import without_decoding


def test_columns_of_images_are_read_without_opening_files(tmp_path):
    missing = str(tmp_path / "nothing.png")
    features = Features({"images": List(Image()), "one": Image(), "text": Value("string")})
    row = {"images": [missing, missing], "one": missing, "text": "a"}
    data = Dataset.from_dict({k: [v, v] for k, v in row.items()}, features=features)
    closed = {"bytes": None, "path": missing}
    read = {"images": [closed, closed], "one": closed, "text": "a"}
    assert list(without_decoding(data.select([1]))) == [read]
    assert len(dataset_hash(data)) == len(sampled_rows_hash(data)) == 64


@pytest.mark.parametrize("hash_of", [dataset_hash, sampled_rows_hash])
def test_the_same_images_have_the_same_hash(hash_of):
    one, two = (Dataset.from_list([{"images": [picture(7)]}]) for _ in range(2))
    assert hash_of(one) == hash_of(two)
    assert hash_of(one) != hash_of(Dataset.from_list([{"images": [picture(8)]}]))
