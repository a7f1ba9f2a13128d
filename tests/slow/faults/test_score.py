"""``python -m export.score``: killed, starved and misled."""

from tests.slow.faults.claims import KeepsItsPlace, Reads


class TestScore(Reads, KeepsItsPlace):
    program = "score"
    source = "bundle"
    inputs_of_its_own = ("bundle/manifest.json", "bundle/model_int8.onnx", "long.jsonl")
    smallest_limit = 7
    under_way = "out.csv.partial"
