"""The papers' runs as configs, and the built-in demo. Plain data; imports no jax.

Source: the configs and scripts of CLIPA's JAX code (B/16, L/14, H/14) and its t5x branch (g/14, bigG/14). "12.8B" is
10,000 times ImageNet's 1,281,167 pictures, in whole batches; "512M" and "128M" are 16,000 steps of 32,768 and 8,000 of
16,384. The CLIPA-v1 runs of the PyTorch code, with CLIP's BPE and causal text, have no recipe here.
"""

from __future__ import annotations

from clipa_fast.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig, TowerSize

_V2_PRETRAIN_SAMPLES = 12_811_670_000
_BF16_MOMENT = OptimizerConfig(first_moment_dtype="bfloat16")
_T5X = OptimizerConfig(first_moment_dtype="bfloat16", decay="all_but_norms")
_NO_DATA = DataConfig(train=())


def _v2_pretrain(
    size: int, optimizer: OptimizerConfig, warmup: int, rate: float = 8e-6, jitter: bool = True
) -> StageConfig:
    return StageConfig(
        name=f"pretrain-{size}",
        image_size=size,
        text_length=8,
        samples=_V2_PRETRAIN_SAMPLES,
        batch_size=65_536,
        base_learning_rate=rate,
        warmup_steps=warmup,
        text_reduction="syntax",
        jitter=jitter,
        optimizer=optimizer,
    )


def _v2_finetune_224(
    optimizer: OptimizerConfig, batch: int = 32_768, warmup: int = 800, mask: float = 0.3
) -> StageConfig:
    return StageConfig(
        name="finetune-224",
        image_size=224,
        text_length=32,
        samples=16_000 * 32_768,
        batch_size=batch,
        base_learning_rate=4e-7,
        warmup_steps=warmup,
        mask_ratio=mask,
        jitter=True,
        optimizer=optimizer,
    )


def _v2_finetune_336(optimizer: OptimizerConfig) -> StageConfig:
    return StageConfig(
        name="finetune-336",
        image_size=336,
        text_length=32,
        samples=8_000 * 16_384,
        batch_size=16_384,
        base_learning_rate=1e-7,
        warmup_steps=1_600,
        mask_ratio=0.4,
        jitter=True,
        optimizer=optimizer,
    )


def _v1_b16(size: int) -> RunConfig:
    # 6.4 epochs of LAION-400M, as the later paper counts them; the config file says 7.
    pretrain = StageConfig(
        name=f"pretrain-{size}",
        image_size=size,
        text_length=32,
        samples=2_560_000_000,
        batch_size=32_768,
        base_learning_rate=8e-6,
        warmup_steps=1_600,
    )
    finetune = StageConfig(
        name="finetune-224",
        image_size=224,
        text_length=32,
        samples=4_000 * 32_768,
        batch_size=32_768,
        base_learning_rate=8e-7,
        warmup_steps=800,
    )
    model = ModelConfig(preset="B/16", image_pool="tok", remat="image")
    return RunConfig(model=model, data=_NO_DATA, stages=(pretrain, finetune))


def _v2(preset: str, stages: tuple[StageConfig, ...]) -> RunConfig:
    return RunConfig(model=ModelConfig(preset=preset, remat="both"), data=_NO_DATA, stages=stages)


_LARGE_STAGES = (_v2_finetune_224(_BF16_MOMENT), _v2_finetune_336(_BF16_MOMENT))
_GIANT_STAGES = (_v2_finetune_224(_T5X), _v2_finetune_336(_T5X))
_BIGG_STAGES = (_v2_finetune_224(_T5X, batch=16_384, warmup=0, mask=0.4), _v2_finetune_336(_T5X))

# Glyphs: 16 + 8 tokens, then 64 + 16 with 30 % of the patches masked. Sized for six minutes on two CPU cores, where
# Muon learns twice as much from a sample as AdamW. No crops: they would cost size and position, which carry meaning.
_DEMO_OPTIMIZER = OptimizerConfig(name="muon", beta2=0.98, weight_decay=0.1)
DEMO = RunConfig(
    model=ModelConfig(
        preset="Ti/8",
        pixel_norm="glyphs",
        vision=TowerSize(width=128, depth=2, mlp_dim=512, num_heads=2),
        text=TowerSize(width=128, depth=2, mlp_dim=512, num_heads=2),
        embed_dim=128,
        scan_unroll=2,
    ),
    data=DataConfig(train=("glyphs",), trained_vocab_size=4096),
    stages=(
        StageConfig(
            name="pretrain",
            image_size=32,
            text_length=8,
            samples=120_000,
            batch_size=256,
            base_learning_rate=4e-3,
            warmup_steps=25,
            text_reduction="syntax",
            min_crop_area=1.0,
            optimizer=_DEMO_OPTIMIZER,
        ),
        StageConfig(
            name="finetune",
            image_size=64,
            text_length=16,
            samples=150_000,
            batch_size=256,
            base_learning_rate=4e-3,
            warmup_steps=20,
            mask_ratio=0.3,
            min_crop_area=1.0,
            optimizer=_DEMO_OPTIMIZER,
        ),
    ),
    log_every=10,
    checkpoint_every=200,
)

RECIPES: dict[str, RunConfig] = {
    "demo": DEMO,
    "v1-b16-112": _v1_b16(112),
    "v1-b16-64": _v1_b16(64),
    "v2-l14": _v2("L/14", (_v2_pretrain(84, _BF16_MOMENT, warmup=800, jitter=False), *_LARGE_STAGES)),
    "v2-h14-70": _v2("H/14", (_v2_pretrain(70, _BF16_MOMENT, warmup=3_200), _LARGE_STAGES[0])),
    "v2-h14": _v2("H/14", (_v2_pretrain(84, _BF16_MOMENT, warmup=3_200), *_LARGE_STAGES)),
    "v2-g14": _v2("g/14", (_v2_pretrain(70, _T5X, warmup=3_200), *_GIANT_STAGES)),
    "v2-bigg14": _v2("bigG/14", (_v2_pretrain(84, _T5X, warmup=3_200, rate=4e-6), *_BIGG_STAGES)),
}
