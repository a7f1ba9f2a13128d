"""P-tuning: a frozen transformer and a small labelled set in, an adapter folder out.

Every entry point of promptfold imports this package first, and so does every process that it starts: a spawned child,
a replica, a worker. Importing it is cheap (no torch) and does two things.

It switches off the telemetry of the libraries below it: ONNX Runtime (from 1.29 on its wheels write a device id and
send events), Gradio, the Hugging Face hub and Ray. Each reads its variable when it is first imported. ``setdefault``: a
user who wants telemetry sets the variable and keeps it.

It makes the package `kernels` look absent, whether it is installed or not: through it transformers fetches code from the
hub and runs it, where a model's settings say so (CVE-2026-4372). Python itself takes None for "cannot be imported".
"""

import os
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

sys.modules["kernels"] = None  # type: ignore[assignment]
