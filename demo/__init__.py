"""The page: one pair of sentences, PyTorch and ONNX Runtime side by side."""

import train  # noqa: F401  -- switches telemetry off before Gradio or ONNX Runtime can be imported
