"""A policy as an ONNX model, by jax2onnx, checked with ONNX Runtime. Extra `onnx`."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from qfleet.config import ConfigError
from qfleet.config.errors import short
from qfleet.exporting.program import Program, random_input

if TYPE_CHECKING:
    import onnx

OPSET = 21
"""Version of ONNX's operators: ONNX Runtime has had it since 1.18."""

_CHECKED = 16  # random observations
_TOLERANCE = 1e-4  # of the largest number; rounding makes a hundredth of it


def check_extra() -> None:
    """Raises ConfigError unless the packages that make and run ONNX models are installed."""
    try:
        with _quiet():
            import jax2onnx
            import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs jax2onnx and ONNX Runtime ({error}); pip install 'qfleet[onnx]', or give another format"
        ) from error
    del jax2onnx, onnxruntime


def write_onnx(program: Program, path: Path, description: str) -> None:
    """Writes an ONNX model that computes what the program does, after comparing both on random observations.

    Args:
      program: the policy.
      path: the file.
      description: text for the model's metadata, under the name `qfleet`.

    Raises:
      ConfigError: if the network has an operation that jax2onnx lacks, or the model computes something else.
    """
    model = _convert(program)
    model.metadata_props.add(key="qfleet", value=description)
    content = model.SerializeToString()
    _check_agrees(program, content)
    path.write_bytes(content)


def _convert(program: Program) -> "onnx.ModelProto":
    with _quiet():
        import jax2onnx

        inputs = [jax.ShapeDtypeStruct(("batch", *port.shape), port.dtype) for port in program.inputs]
        try:
            return jax2onnx.to_onnx(
                program.function,
                inputs,
                model_name="policy",
                opset=OPSET,
                input_names=[port.name for port in program.inputs],
                output_names=[port.name for port in program.outputs],
            )
        except Exception as error:  # jax2onnx raises errors of many kinds for what it lacks
            raise ConfigError(
                f"a network must consist of operations that jax2onnx converts, got {short(error)}; export it as "
                f"stablehlo, or change the network"
            ) from error


def _check_agrees(program: Program, content: bytes) -> None:
    import onnxruntime

    random = np.random.default_rng(0)
    inputs = {port.name: random_input(port, _CHECKED, random) for port in program.inputs}
    with jax.default_matmul_precision("highest"):  # by default a GPU rounds factors to 10 bits (TF32)
        expected = jax.device_get(jax.jit(program.function)(*inputs.values()))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, inputs)
    for port, ours, theirs in list(zip(program.outputs, expected, found, strict=True))[1:]:
        finite = np.isfinite(ours)
        largest = np.max(np.abs(ours[finite]), initial=1.0)
        difference = np.max(np.abs(ours[finite] - theirs[finite]), initial=0.0)
        if not difference <= _TOLERANCE * largest or not np.array_equal(ours[~finite], theirs[~finite]):
            raise ConfigError(
                f"an ONNX model must compute what the policy does, got {port.name} that differ by {difference:g} in "
                f"ONNX Runtime {onnxruntime.__version__}; export it as stablehlo, or change the network"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps jax2onnx from printing, warning and logging, and from giving the root logger a handler."""
    root = logging.getLogger()
    handlers, disabled = root.handlers[:], root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
