"""What other trainers call our settings: TRL, verl, and the repository that the paper's code was built on."""

from __future__ import annotations

import re

# Our flag, and in brackets its unit if theirs differs; then their names (of dotted names, the last part). The flag of
# `opsd eval` comes second in a line.
_NAMES = """
--student --model: model_path model_name_or_path model_name student_model_path actor_model_path pretrained_model_name
--teacher: teacher_model teacher_model_path teacher_model_name_or_path teacher_path ref_model
--prompts --suite: dataset dataset_name data train_files train_file train_data data_path train_dataset prompt_data
--eval.suite --suite: val_files val_file test_files eval_dataset eval_data
--out: output_dir output save_dir default_local_dir ckpt_path output_path
--steps: max_steps total_steps num_steps total_training_steps
--steps (in optimiser steps, not epochs): num_train_epochs epochs total_epochs num_epochs
--prompts_per_step: train_batch_size batch_size global_batch_size ppo_mini_batch_size
--prompts_per_step (of all devices together, for one optimiser step): per_device_train_batch_size
--prompt_field: prompt_key prompt_column dataset_text_field input_key
--answer_field: answer_key label_key answer_column reward_key
--thinking: enable_thinking
--rollout.samples_per_prompt --samples: num_generations rollout_n n n_samples num_samples group_size samples_per_prompt
--rollout.max_new_tokens --max_new_tokens: max_completion_length max_response_length max_tokens response_length
--rollout.max_prompt_tokens --max_prompt_tokens: max_prompt_length max_prompt_len prompt_length
--rollout.temperature --temperature: temperature
--rollout.top_p --top_p: top_p
--rollout.top_k --top_k: top_k
--rollout.stop_tokens --stop_tokens: stop_token_ids stop_tokens stop eos_token_id eos_token
--rollout.truncated: mask_truncated_completions overlong_filtering filter_truncated mask_truncated
--rollout.engine --engine: use_vllm vllm_mode rollout_name backend
--rollout.gpu_memory_share --gpu_memory_share: gpu_memory_utilization vllm_gpu_memory_utilization
--rollout.tensor_parallel: tensor_model_parallel_size vllm_tensor_parallel_size tp_size
--select.by: selector token_selection
--select.retention: retention keep_ratio token_ratio retention_ratio
--loss.divergence: loss_type opd_loss_type kl_type divergence_type
--loss.beta: beta kl_beta alpha_jsd
--loss.reward_beta: opd_reward_beta
--loss.chunk_tokens: opd_chunk_size chunk_size
--loss.temperature: distillation_temperature kd_temperature
--optim.lr: lr learning_rate actor_lr
--optim.kind: optim optimizer optimizer_type
--optim.warmup_steps: warmup_steps lr_warmup_steps num_warmup_steps
--optim.warmup_steps (in steps, not a fraction of them): warmup_ratio lr_warmup_steps_ratio
--optim.schedule (cosine or constant): lr_scheduler_type lr_scheduler warmup_style
--optim.min_lr_fraction: min_lr_ratio
--optim.weight_decay: weight_decay
--optim.beta1: adam_beta1
--optim.beta2: adam_beta2
--optim.eps: adam_epsilon adam_eps
--optim.max_grad_norm: max_grad_norm grad_clip clip_grad gradient_clipping
--lora.rank: lora_r lora_rank use_peft use_lora
--lora.alpha: lora_alpha
--lora.target_modules: lora_target_modules target_modules
--engine.dtype --dtype: bf16 fp16 torch_dtype dtype model_dtype precision
--engine.kind: deepspeed strategy fsdp
--engine.zero_stage: zero_stage
--engine.device --device: device
--engine.micro_batch_tokens: ppo_max_token_len_per_gpu
--engine.micro_batch_tokens (tokens in each forward pass): gradient_accumulation_steps micro_batch_size
--eval.every: eval_steps test_freq eval_interval eval_freq
--eval.samples --samples: val_n eval_samples
--checkpoint.every: save_steps save_freq save_interval
--checkpoint.keep: save_total_limit max_ckpt_to_keep max_actor_ckpt_to_keep
--telemetry.every: logging_steps log_freq log_interval
--track.wandb: report_to logger use_wandb wandb
--track.tensorboard: tensorboard use_tensorboard
--track.project: project_name wandb_project
--resume: resume_from_checkpoint resume_mode resume_from
"""
_LINES = [re.fullmatch(r"([^(:]+)(\(.*\))?: (.*)", line) for line in _NAMES.strip().splitlines()]
_FLAGS_OF = {name: line[1].split() for line in _LINES if line for name in line[3].split()}
_UNITS = {name: line[2] for line in _LINES if line and line[2] for name in line[3].split()}


def flag_for(name: str, flags: list[str]) -> str | None:
    """Which of `flags` a flag of another trainer means: --learning_rate, actor.optim.lr=1e-6, TRAIN_BATCH_SIZE."""
    meant = [flag for key in _keys(name) for flag in _FLAGS_OF.get(key, [])]
    return next((flag for flag in meant if flag in flags), None)


def unit_for(name: str) -> str:
    """In brackets, what our flag counts, if the other trainer's flag counts something else; otherwise ""."""
    return next((_UNITS[key] for key in _keys(name) if key in _UNITS), "")


def _keys(name: str) -> tuple[str, str]:
    """The whole name, which is more specific, and its last part."""
    plain = re.split(r"[=\s]", name.lstrip("-"))[0].lower().replace("-", "_")
    return plain.replace(".", "_"), plain.rpartition(".")[2]
