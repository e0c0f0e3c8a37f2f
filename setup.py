"""Package definition: packages, requirements and entry points. Tool settings: pyproject.toml."""

from setuptools import find_packages, setup

# transformers: >= 5.16.1 for the packed-sequence masks we test, < 5.20 because vLLM 0.32 stops there.
CORE = [
    "torch>=2.11,<2.15",
    "transformers>=5.16.1,<5.20",
    "safetensors>=0.6",
    "xxhash>=3.4",
    "filelock>=3.13",
    "numpy>=2.0",
    "pandas>=2.2",
    "pyarrow>=18",
    "pyyaml>=6",
    "huggingface_hub>=1.5",
    "matplotlib>=3.9",
    "tyro>=1.0,<1.1",
    "rich>=13.9",
    "psutil>=6",
    "math-verify>=0.9,<0.10",
    # transformers needs it to inspect weights without loading them, and to read quantised weights and GGUF files.
    "accelerate>=1.10",
]
LORA = ["peft>=0.19,<0.22"]
WANDB = ["wandb>=0.28,<0.32", "wandb-workspaces>=0.4,<0.5"]
TENSORBOARD = ["tensorboard>=2.18,<3"]
DEEPSPEED = ["deepspeed>=0.19,<0.20"]
# The same bounds as in tip_patch/adapters/trl_checks.py: selection hooks into TRL's internals.
TRL = ["trl>=1.16,<1.17"]
# Takes long to compile if there is no wheel; without it, attention uses torch's own variable-length kernel.
FLASH = ["flash-attn>=2.8"]
GPU = ["vllm>=0.32,<0.33", *DEEPSPEED, *LORA, *WANDB]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.14",
    "pyrefly>=1.5",
    # transformers needs it to read SmolLM2's GGUF file.
    "gguf>=0.17",
    # Without a GPU, the loss's CUDA kernels run in its interpreter and compile; torch's CPU build does not include it.
    "triton>=3.7; sys_platform == 'linux' and platform_machine == 'x86_64'",
    # For recipes/grpo_teacher.sh.
    *TRL,
    *LORA,
    *WANDB,
    *TENSORBOARD,
]

setup(
    name="opsd-tip",
    version="0.2.0",
    description="On-policy distillation that trains on the tokens that matter",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opsd", "opsd.*", "tip_patch", "tip_patch.*"]),
    package_data={"opsd.viewer": ["*.html", "*.css", "*.js"]},
    install_requires=CORE,
    extras_require={
        "gpu": GPU,
        "flash": FLASH,
        "deepspeed": DEEPSPEED,
        "lora": LORA,
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        "test": TEST,
        "trl": TRL,
    },
    entry_points={
        "console_scripts": ["opsd = opsd.__main__:main"],
        "opsd.selectors": [
            "entropy_sample = tip_patch.selectors:EntropySample",
            "entropy = tip_patch.selectors:Entropy",
            "soft_or = tip_patch.selectors:SoftOr",
            "soft_or_bottom = tip_patch.selectors:SoftOrBottom",
            "q3 = tip_patch.selectors:Q3",
            "divergence = tip_patch.selectors:Divergence",
            "random = tip_patch.selectors:Random",
            "adaptive_kl = tip_patch.baselines:AdaptiveKL",
            "first_fraction = tip_patch.baselines:FirstFraction",
            "position_weighted = tip_patch.baselines:PositionWeighted",
            "iw_opd = tip_patch.baselines:IWOPD",
            "teachability = tip_patch.baselines:Teachability",
            "verify = tip_patch.baselines:Verify",
            "rock_bypass = tip_patch.rock_tokens:RockBypass",
        ],
        "opsd.environments": ["travel = opsd.environments.travel.world:TravelWorld"],
        "opsd.telemetry": [
            "quadrants = tip_patch.quadrants:QuadrantTelemetry",
            "shadow_masks = tip_patch.overlap:ShadowMasks",
        ],
    },
)
