"""How well vLLM's answers are transformers', by modality, and how fast each condition starts.

``python -m suites.meta.served qwen2_5_vl-tiny [--quantizer awq] [--kernel marlin] [--samples 16]``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fixtures.adapters import adapter_for
from fixtures.core import metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.engines import offline, saying
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.replies import Taught, compare, paired
from fixtures.engines.server import Serving
from fixtures.quantizers import calibration, quantizer_named, recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw

NEW_TOKENS = 48


def mean_kl(one: list[Taught], other: list[Taught]) -> float:
    """Mean KL per token, in nats."""
    return metrics.mean(torch.cat([metrics.token_kl(a, b) for a, b in paired(one, other)]))


def main(arguments: list[str] | None = None) -> int:
    """Print, per condition and modality, how many greedy answers are the same, and the KL to transformers' float32."""
    parser = argparse.ArgumentParser(prog="python -m suites.meta.served", description=__doc__)
    parser.add_argument("subject", help="qwen2_5_vl-tiny, qwen2_5_omni-tiny, or a folder")
    parser.add_argument("--quantizer", action="append", default=[])
    parser.add_argument("--kernel", action="append", default=[])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    folder = Path(options.subject)
    reference = Checkpoint(folder if folder.is_dir() else shipped(options.subject))
    adapter = adapter_for(reference)
    scratch = Path(tempfile.mkdtemp(prefix="served-"))
    conditions: dict[str, tuple[Checkpoint, Serving]] = {}
    media = tuple((m, 4) for m in adapter.modalities if m not in ("text", "mixed"))
    plain = Serving(memory_share=0.05, kv_bytes=1 << 30, eager=True, media=media, max_num_seqs=64)
    conditions["fp16 eager"] = (reference, plain)
    conditions["fp16 graphs"] = (reference, Serving(**{**vars(plain), "eager": False}))
    for name in options.quantizer:
        samples = calibration.built_in(adapter) if quantizer_named(name).calibrated else ()
        recipe = recipe_for(name, None, (), calibration.digest(samples) if samples else "")
        artifact = Checkpoint(cached_artifact(reference, recipe, samples, scratch, device=options.device))
        for kernel in ["", *options.kernel]:
            conditions[f"{name} {kernel} eager"] = (artifact, Serving(**{**vars(plain), "kernel": kernel}))
    asked = {modality: tuple(draw(modality, "evaluation", options.samples)) for modality in adapter.modalities}
    batches = [offline.Batch(m, samples, new_tokens=NEW_TOKENS) for m, samples in asked.items()]
    batches += [offline.Batch(f"{m}-taught", samples, taught=True) for m, samples in asked.items()]
    with ThreadPoolExecutor(8) as pool:
        running = {
            name: pool.submit(offline.run, *condition, batches, scratch / name.replace(" ", "-"))
            for name, condition in conditions.items()
        }
        exact = {}
        for checkpoint in {c.digest: c for c, _ in conditions.values()}.values():
            engine = TransformersEngine(checkpoint, adapter, torch.float32, options.device)
            exact[checkpoint.digest] = {
                m: (saying.replies(engine, s, NEW_TOKENS), saying.taught(engine, s)) for m, s in asked.items()
            }
        began = time.monotonic()
        for name, future in running.items():
            try:
                recorded = future.result()
            except Exception as error:
                print(f"{name}: {error}")
                continue
            print(f"{name}: {recorded.started} (waited {time.monotonic() - began:.0f} s)")
            for modality in asked:
                replies, taught = exact[conditions[name][0].digest][modality]
                compared = compare(replies, recorded.greedy[modality])
                kl = mean_kl(taught, recorded.taught[f"{modality}-taught"])
                print(
                    f"  {modality:<6} same {compared.same}/{compared.answers}, {compared.tokens} tokens, "
                    f"unexcused {len(compared.unexcused)}, KL {kl:.3g} nats; {list(map(str, compared.divergences[:2]))}"
                )
                print("\n".join(f"      {line}" for line in compared.unexcused[:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
