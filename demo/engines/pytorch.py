"""PyTorch as an engine: eager, compiled or in bf16."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.timing import Arrays, Backend
from export.runtime.classifier import Execution
from train.common.errors import EngineError

EAGER, COMPILED, BF16 = "eager", "compiled", "bf16"


PYTORCH_MODES = {
    EAGER: "fp32, eager: as in PEFT's tutorial",
    COMPILED: "fp32, torch.compile",
    BF16: "bf16, eager",
}
"""How the PyTorch side may run, with words for people."""


@dataclass(frozen=True)
class PromptLogits:
    """A text with the prompt that was learned, and with others in its place.

    Attributes:
        learned: logits with the learned prompt; float32, shape = (n_batch, n_labels)
        random: the same with random prompts, of which every vector is as long as the learned one;
            float32, shape = (n_prompts, n_batch, n_labels)
        none: with no prompt at all, and the same head.
    """

    learned: np.ndarray
    random: np.ndarray
    none: np.ndarray


class PyTorchBackend:
    """The adapter as the PEFT tutorial runs it, `PeftModel.forward`; on request compiled, or in bf16."""

    def __init__(self, adapter_folder: Path, threads: int, *, mode: str = EAGER) -> None:
        """Load an adapter.

        Args:
            mode: one of `PYTORCH_MODES`.

        Raises:
            EngineError: `torch.compile` does not work on this machine.
            PromptfoldError: as `load_adapter` and `load_peft_model` do.
        """
        import torch

        from train.adapter.folder import load_adapter
        from train.adapter.peft import find_adapter_base, load_peft_model

        torch.set_num_threads(threads)
        self._adapter = load_adapter(adapter_folder)
        self._base = find_adapter_base(self._adapter)
        on_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_cuda else "cpu")
        model: Any = load_peft_model(self._adapter.folder, self._base, self._adapter.labels)
        self._model = model.to(self._device, torch.bfloat16 if mode == BF16 else torch.float32)
        self._run = self._compiled() if mode == COMPILED else self._model
        self.execution = Execution(
            engine=f"PyTorch {torch.__version__.partition('+')[0]}",
            provider=torch.cuda.get_device_name() if on_cuda else "CPU",
            on_cuda=on_cuda,
            threads=threads,
            precision={EAGER: "fp32", COMPILED: "fp32, compiled", BF16: "bf16"}[mode],
            note="" if on_cuda else "PyTorch sees no GPU",
        )

    def _compiled(self) -> Any:
        """The model under `torch.compile`, for any length of text, compiled by a first run."""
        import torch

        # Beside two engines there is no core for a pool of compilers.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        run = torch.compile(self._model, dynamic=True)
        ones = torch.ones((1, 8), dtype=torch.long, device=self._device)
        inputs = {"input_ids": ones, "attention_mask": ones}
        if getattr(self._model.config, "type_vocab_size", 1) > 1:
            inputs["token_type_ids"] = torch.zeros_like(ones)
        try:
            with torch.inference_mode():
                run(**inputs)
        except Exception as cause:  # whatever the compiler, or the one that it calls, raises
            reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
            raise EngineError(
                f"torch.compile does not work here ({reason[:200]}). It needs a C++ compiler; choose another way for PyTorch."
            ) from cause
        return run

    def logits(self, arrays: Arrays) -> np.ndarray:
        """See `Backend`; the copy back to the CPU waits until the GPU is done."""
        return self._logits(self._run, arrays)

    def _logits(self, run: Any, arrays: Arrays) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
            return run(**tensors).logits.float().cpu().numpy()

    def prompt_logits(self, arrays: Arrays, n_random: int, seed: int) -> PromptLogits:
        """What the learned prompt does to a text: the same with random prompts, and with none.

        Args:
            n_random: how many random prompts.
            seed: of the random numbers.
        """
        import torch

        # The number of a prompt's parameters is the same in every setup of PEFT: one table.
        table: torch.Tensor = self._model.prompt_encoder["default"].embedding.weight
        learned = self.logits(arrays)
        before = table.detach().clone()
        # Of P-Tuning v2 a row holds a key and a value for each layer, and keys are longer than values.
        parts = before.view(len(before), -1, self._model.active_peft_config.token_dim)
        generator = torch.Generator().manual_seed(seed)
        randoms = []
        with torch.no_grad():
            try:
                for _ in range(n_random):
                    noise = torch.randn(parts.shape, generator=generator).to(parts)
                    noise *= parts.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
                    table.copy_(noise.view_as(before))
                    randoms.append(self.logits(arrays))
            finally:
                table.copy_(before)
        return PromptLogits(learned, np.stack(randoms), self._logits(self._model.base_model, arrays))


def make_pytorch_backend(folder: Path, threads: int, *, mode: str = EAGER) -> Backend:
    """Load an adapter folder into PyTorch."""
    return PyTorchBackend(folder, threads, mode=mode)
