"""The fold: an adapter in, a bundle with one static ONNX graph out, and the runtime that serves it."""

import train  # noqa: F401  -- switches telemetry off before ONNX Runtime can be imported
