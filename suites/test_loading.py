"""Loading: transformers and the quantization library compute what an artifact's bytes say.

Parity is measured on weights that our own code decodes. Here the library's modules and kernels run the same artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fixtures.adapters import Adapter
from fixtures.core import metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import Limits
from fixtures.core.samples import Sample
from fixtures.engines.hf import TransformersEngine
from fixtures.formats import format_of
from fixtures.options import Selection
from fixtures.verifying import Verify

pytestmark = pytest.mark.by_library

SAMPLES = 8  # per modality
Logits = dict[str, Tensor]  # modality -> of every taught token [tokens, vocabulary]


@pytest.fixture(scope="session")
def decoded_logits(logits_of: Callable[..., Logits]) -> Logits:
    """By our own decoding, in float32."""
    return logits_of(torch.float32)


@pytest.fixture(scope="session")
def rounded_logits(artifact: Checkpoint, logits_of: Callable[..., Logits]) -> Logits:
    """The same in the 16 bits that the library computes in: how far rounding alone moves them."""
    return logits_of(library_dtype(artifact))


@pytest.fixture(scope="session")
def library_logits(artifact: Checkpoint, logits_of: Callable[..., Logits]) -> Logits:
    """By the library's modules."""
    return logits_of(library_dtype(artifact), kernels=True)


def library_dtype(artifact: Checkpoint) -> torch.dtype:
    """The 16 bits that an artifact's library computes in, on a GPU as well: AWQ's kernels know float16 alone."""
    return torch.float16 if format_of(artifact).method == "awq" else torch.bfloat16


def test_library_computes_what_is_stored(
    decoded_logits: Logits, rounded_logits: Logits, library_logits: Logits, limits: Limits, verify: Verify
) -> None:
    """The library's next-token distributions are those of the decoded weights, up to the rounding of 16 bits."""
    limit = limits("loading.of_noise_floor")
    for modality, decoded in decoded_logits.items():
        noise = metrics.mean(metrics.token_kl(decoded, rounded_logits[modality]))
        library = metrics.mean(metrics.token_kl(decoded, library_logits[modality]))
        verify(
            f"mean token KL of the library's {modality}, of the noise floor",
            library / noise if noise else None,
            at_most=limit,
            detail=f"library {library:.3g} nats, decoded weights in 16 bits {noise:.3g} nats",
        )
    verify("modalities compared", len(decoded_logits), at_least=1)


@pytest.fixture(scope="session")
def logits_of(
    artifact: Checkpoint,
    adapter: Adapter,
    selection: Selection,
    evaluation_samples: Callable[[str], Sequence[Sample]],
) -> Callable[..., Logits]:
    """Runs the artifact in a precision, one model in memory at a time."""

    def run(dtype: torch.dtype, *, kernels: bool = False) -> Logits:
        engine = TransformersEngine(artifact, adapter, dtype, selection.device, kernels=kernels)
        return {
            modality: torch.cat([logits for _, logits, _ in engine.taught(evaluation_samples(modality)[:SAMPLES])])
            for modality in selection.modalities_of(adapter)
        }

    return run
