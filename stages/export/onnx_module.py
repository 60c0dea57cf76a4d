"""An ONNX graph as a torch module: what embeds sets and is timed need not know the runtime."""

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from ...cache.disk.cores import usable_cores


class OnnxModule(nn.Module):
    """A graph with one input and one output, on the CPU, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        """Raises what ONNX Runtime does if the file is no graph."""
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = min(torch.get_num_threads(), usable_cores())
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self.session.get_inputs()[0].name

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, ...) to (B, D) float32."""
        (embeddings,) = self.session.run(None, {self._input: inputs.cpu().contiguous().numpy()})
        return torch.from_numpy(embeddings)
