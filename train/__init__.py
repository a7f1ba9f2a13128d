"""P-tuning: a frozen transformer and a small labelled set in, an adapter folder out.

Importing this package is cheap (no torch) and switches off the telemetry of the libraries below it:
ONNX Runtime (from 1.29 on its wheels write a device id and send events), Gradio, the Hugging Face
hub and Ray. Each reads its variable when it is first imported, and every entry point of promptfold imports
this package first. ``setdefault``: a user who wants telemetry sets the variable and keeps it.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
