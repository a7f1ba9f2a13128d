"""``python -m train``: killed, starved and misled."""

from tests.slow.faults.claims import KeepsItsPlace, Reads


class TestTrain(Reads, KeepsItsPlace):
    program = "train"
    source = "base"
    inputs_of_its_own = ("train.jsonl", "base/model.safetensors", "base/config.json")
    under_way = "adapter.checkpoints"
