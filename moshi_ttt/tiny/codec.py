"""Trains the tiny Mimi: `python -m moshi_ttt.tiny.codec --out DIR`.

A true `moshi.models.compression.MimiModel` (ratios 8, 6, 5, 4; 24 kHz; 12.5 Hz; causal; split
residual quantiser), only narrow. Three steps, each from the seed:

1. distil: the encoder's latents are regressed on log-mel frames (as Mimi distils WavLM,
   arXiv:2410.00037, section 3.3); the first codebook's projection on cepstra alone, so that its
   codes name the sound and not the waveform's phase;
2. fit: k-means and moving averages on those latents (moshi's own);
3. decode: the decoder is trained on quantised latents against spectra at several resolutions and
   the level.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import _seanet_kwargs, _transformer_kwargs, get_mimi
from moshi.quantization.core_vq import EuclideanCodebook
from moshi.quantization.vq import ResidualVectorQuantizer, SplitResidualVectorQuantizer
from safetensors.torch import save_file
from torch import Tensor, nn

from .codec_data import batches, training_speech
from .mel import FRAME, MELS, PARTS, cepstra, envelope, log_mel

CODEBOOKS, BINS = 8, 64
_PROJECTION = 24
_MEL_MEAN, _MEL_SCALE = -6.0, 3.0


def mimi_config(filters: int = 6, dimension: int = 64) -> dict[str, Any]:
    """The configuration `moshi.models.loaders.get_mimi` builds the tiny Mimi from."""
    seanet = dict(_seanet_kwargs, dimension=dimension, n_filters=filters)
    transformer = dict(
        _transformer_kwargs,
        d_model=dimension,
        num_heads=2,
        num_layers=1,
        layer_scale=0.1,
        context=8,  # 320 ms: what came long before a sound does not change its codes
        dim_feedforward=2 * dimension,
        input_dimension=dimension,
        output_dimensions=[dimension],
    )
    quantizer = {
        "dimension": _PROJECTION,
        "n_q": CODEBOOKS,
        "bins": BINS,
        "input_dimension": dimension,
        "output_dimension": dimension,
    }
    return {
        "sample_rate": 24_000,
        "channels": 1,
        "frame_rate": 12.5,
        "seanet": seanet,
        "quantizer": quantizer,
        "transformer": transformer,
    }


def _halves(mimi: MimiModel) -> tuple[ResidualVectorQuantizer, ResidualVectorQuantizer]:
    """The quantiser of the first codebook and that of the others."""
    quantizer = mimi.quantizer
    assert isinstance(quantizer, SplitResidualVectorQuantizer)
    return quantizer.rvq_first, quantizer.rvq_rest


def _optimiser(
    parameters: list[nn.Parameter], steps: int, lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a short warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.8, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    return optimiser, schedule


def _targets(pcm: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log-mel frames `[B, T, PARTS * MELS]` and cepstra `[B, T, _PROJECTION]`."""
    mels = (log_mel(pcm) - _MEL_MEAN) / _MEL_SCALE
    return mels.flatten(-2), cepstra(mels, _PROJECTION)


def distil(mimi: MimiModel, speech: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Step 1; returns R^2 of the log-mel head and of the first codebook's projection."""
    mimi.train()
    assert mimi.encoder_transformer is not None
    first, rest = _halves(mimi)
    head = nn.Linear(mimi.dimension, PARTS * MELS)
    rest_head = nn.Linear(_PROJECTION, PARTS * MELS)
    parameters = [
        *mimi.encoder.parameters(),
        *mimi.encoder_transformer.parameters(),
        *mimi.downsample.parameters(),
        *first.input_proj.parameters(),
        *rest.input_proj.parameters(),
        *head.parameters(),
        *rest_head.parameters(),
    ]
    optimiser, schedule = _optimiser(parameters, steps, 3e-3)
    scores: list[tuple[float, float]] = []
    for pcm in batches(speech, steps, 8, 25, seed, "distil"):
        mels, shape = _targets(pcm)
        latents = mimi._encode_to_unquantized_latent(pcm[:, None])
        guess = head(latents.mT)
        narrow = first.input_proj(latents).mT
        acoustic = rest_head(rest.input_proj(latents).mT)
        # The first two frames of a cut lack the past that a stream would have had.
        errors = [
            (a - b)[:, 2:].square().mean() / b[:, 2:].var()
            for a, b in ((guess, mels), (acoustic, mels), (narrow, shape))
        ]
        loss = torch.stack(errors).sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        scores.append((1 - errors[0].item(), 1 - errors[2].item()))
    late = torch.tensor(scores[-50:]).mean(0)
    return {"r2_log_mel": late[0].item(), "r2_codebook_0": late[1].item()}


@torch.no_grad()
def fit_codebooks(mimi: MimiModel, speech: Tensor, minutes: float = 20.0) -> Tensor:
    """Step 2: k-means, then moving averages; returns the latents used, `[1, D, T]`."""
    mimi.eval()
    samples = min(len(speech), int(minutes * 60 * 24_000)) // FRAME * FRAME
    latents = torch.cat(
        [
            mimi._encode_to_unquantized_latent(piece[None, None])
            for piece in speech[:samples].split(FRAME * 500)
        ],
        dim=-1,
    )
    quantizer = mimi.quantizer
    quantizer.train()
    # One residual level is initialised a call, the rest of the calls are moving averages.
    for _ in range(CODEBOOKS + 2):
        quantizer(latents, mimi.frame_rate)
    for part in latents.split(4000, dim=-1) * 15:
        quantizer(part, mimi.frame_rate)
    quantizer.eval()
    for module in quantizer.modules():
        if isinstance(module, EuclideanCodebook):
            # Sums of thousands of vectors do not fit half precision; their means do.
            module.embedding_sum.copy_(module.embedding.clone())
            module.cluster_usage.fill_(1.0)
            module.register_buffer("_embedding", None, persistent=False)
    return latents


def _spectral_loss(guess: Tensor, pcm: Tensor) -> Tensor:
    """L1 of log magnitudes and of magnitudes at several resolutions, and of the level in dB."""
    loss = guess.new_zeros(())
    for size in (2048, 1024, 512, 256):
        window = torch.hann_window(size)
        a, b = (
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs()
            for x in (guess, pcm)
        )
        a, b = a / size**0.5, b / size**0.5
        loss = loss + (torch.log(a + 1e-3) - torch.log(b + 1e-3)).abs().mean()
        loss = loss + 2.0 * (a - b).abs().mean() / (b.mean() + 1e-3)
    level = [torch.log(envelope(x, 480) + 3e-4) for x in (guess, pcm)]
    return loss + 2.0 * (level[0] - level[1]).abs().mean()


def train_decoder(mimi: MimiModel, speech: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Step 3; returns the last losses' mean."""
    mimi.train()
    mimi.quantizer.eval()
    assert mimi.decoder_transformer is not None
    first, rest = _halves(mimi)
    parameters = [
        *mimi.decoder.parameters(),
        *mimi.decoder_transformer.parameters(),
        *mimi.upsample.parameters(),
        *first.output_proj.parameters(),
        *rest.output_proj.parameters(),
    ]
    optimiser, schedule = _optimiser(parameters, steps, 2e-3)
    losses: list[float] = []
    for pcm in batches(speech, steps, 8, 20, seed, "decode"):
        with torch.no_grad():
            codes = mimi.encode(pcm[:, None])
        loss = _spectral_loss(mimi.decode(codes)[:, 0, 2 * FRAME :], pcm[:, 2 * FRAME :])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return {"decoder_loss": float(np.mean(losses[-50:]))}


@torch.no_grad()
def match_level(mimi: MimiModel, speech: Tensor) -> float:
    """Scale the decoder's last convolution so that speech keeps its level; returns the gain.

    Spectra compared in logarithms leave decoded speech a few dB below its input.
    """
    mimi.eval()
    pcm = speech[None, None, : FRAME * 1500]
    loud = envelope(pcm).flatten() > 0.01
    heard = envelope(mimi.decode(mimi.encode(pcm))).flatten()
    gain = (envelope(pcm).flatten()[loud].square().mean() / heard[loud].square().mean()).sqrt()
    for parameter in [
        p for m in mimi.decoder.modules() if isinstance(m, nn.Conv1d) for p in m.parameters()
    ][-2:]:
        parameter.mul_(gain)
    return gain.item()


def train(
    out: str,
    minutes: float = 40.0,
    encoder_steps: int = 1500,
    decoder_steps: int = 1500,
    seed: int = 0,
) -> dict[str, float]:
    """Train a tiny Mimi and write `mimi.safetensors` (float16) and `mimi_config.json`.

    Args:
        out: folder, made if missing.
        minutes: of speech to train on.
        encoder_steps: of 8 x 2 s.
        decoder_steps: of 8 x 1.6 s.
        seed: of weights, batches and speech.

    Returns:
        R^2 of the distillation, the decoder's loss, and seconds taken.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    speech = training_speech(seed, minutes)
    config = mimi_config()
    mimi = get_mimi(None, config, num_codebooks=CODEBOOKS)
    report = distil(mimi, speech, encoder_steps, seed + 1)
    fit_codebooks(mimi, speech)
    report |= train_decoder(mimi, speech, decoder_steps, seed + 2)
    report["gain"] = match_level(mimi, speech)
    report["seconds"] = time.perf_counter() - begin
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().half().contiguous() for name, value in mimi.state_dict().items()}
    save_file(state, folder / "mimi.safetensors")
    (folder / "mimi_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return report


if __name__ == "__main__":
    import fire

    fire.Fire(train)
