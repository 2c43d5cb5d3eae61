"""Every key of the YAMLs of MindFormers v1.6.0 and of the torch release's fork, and what becomes of it."""

# read, and followed
USED = {
    "": (
        "auto_trans_ckpt do_eval ignore_data_skip infer_precision_sync init_start_profile "
        "layer_scale load_checkpoint load_ckpt_format micro_batch_interleave_num only_save_strategy "
        "output_dir profile profile_communication profile_memory profile_start_step "
        "profile_stop_step resume_training run_mode seed src_strategy_path_or_dir "
        "transform_process_num use_parallel"
    ),
    "callbacks[]": (
        "async_save checkpoint_format integrated_save keep_checkpoint_max prefix save_checkpoint_steps type"
    ),
    "context": (
        "device_id device_target max_call_depth max_device_memory memory_optimize_level "
        "mempool_block_size mode save_graphs save_graphs_path"
    ),
    "context.jit_config": "jit_level",
    "eval_dataset.data_loader": "dataset_dir shuffle type",
    "eval_dataset": (
        "drop_remainder input_columns num_parallel_workers numa_enable prefetch_size "
        "python_multiprocessing repeat"
    ),
    "eval_dataset_task": "type",
    "lr_schedule": "learning_rate lr_end total_steps type warmup_ratio warmup_steps",
    "metric": "type",
    "model.arch": "auto_register type",
    "model.model_config": (
        "attention_dropout_prob auto_register batch_size block_size bos_token_id compute_dtype "
        "do_sample embed_dropout_prob eos_token_id extend_method fine_grain_interleave "
        "hidden_dropout_prob hidden_size ignore_token_id intermediate_size is_dynamic "
        "layernorm_compute_type max_decode_length mean n_kv_heads num_blocks num_heads num_layers "
        "offset pad_token_id param_init_type pp_interleave_num qkv_concat repetition_penalty "
        "res_dtype rms_norm_eps rotary_dtype seq_length sigma softmax_compute_type top_k top_p type "
        "use_flash_attention use_past vocab_size"
    ),
    "moe_config": (
        "aux_loss_factors aux_loss_types balance_via_topk_bias capacity_factor comp_comm_parallel "
        "comp_comm_parallel_degree enable_sdrop ep_extend_tp expert_num group_wise_a2a "
        "max_router_load moe_intermediate_size norm_topk_prob num_experts_chosen router_dense_type "
        "routing_policy shared_expert_num topk_bias_update_rate use_fused_ops_topkrouter"
    ),
    "optimizer": "betas eps type weight_decay",
    "parallel": (
        "enable_alltoall enable_parallel_optimizer full_batch gradients_mean parallel_mode "
        "search_mode strategy_ckpt_save_file"
    ),
    "parallel.parallel_optimizer_config": (
        "gradient_accumulation_shard optimizer_weight_shard_size parallel_optimizer_threshold"
    ),
    "parallel.pipeline_config": "pipeline_interleave pipeline_scheduler",
    "parallel.strategy_ckpt_config": "only_trainable_params save_file",
    "parallel_config": (
        "data_parallel expert_parallel gradient_aggregation_group micro_batch_num model_parallel "
        "pipeline_stage use_seq_parallel vocab_emb_dp"
    ),
    "processor": "return_tensors",
    "processor.tokenizer": "auto_register bos_token eos_token pad_token type vocab_file",
    "recompute_config": (
        "mp_comm_recompute parallel_optimizer_comm_recompute recompute recompute_slice_activation "
        "select_comm_recompute select_recompute"
    ),
    "runner_config": "batch_size epochs gradient_accumulation_steps sink_mode sink_size",
    "runner_wrapper": "scale_sense type use_clip_grad",
    "train_dataset": (
        "drop_remainder input_columns num_parallel_workers numa_enable prefetch_size "
        "python_multiprocessing repeat"
    ),
    "train_dataset.data_loader": "dataset_dir shuffle type",
    "train_dataset_task": "type",
    "trainer": "model_name type",
}
# without effect here: left out, with a note
NOTED = {
    "": "auto_tune autotune_per_step filepath_prefix layer_decay lr_scale_factor remote_save_url",
    "context": "affinity_cpu_list enable_graph_kernel",
    "model.model_config": (
        "checkpoint_name_or_path out_proj_has_bias parallel_optimizer pretrain_seqlen router_dense_type "
        "use_past_shard"
    ),
    "model.model_config.auto_map": "AutoConfig AutoModel AutoTokenizer",
    "processor.tokenizer": "unk_token",
    "train_dataset": "batch_size",
    "eval_callbacks[]": "type",
}
# to change, with what the line to write names
CHANGE = {
    "model.model_config.pet_config": "remove pet_config to train all weights",
    "context.ascend_config.parallel_speed_up_json_path": "remove the line",
}


def keys(table: dict[str, str]) -> set[str]:
    """The dotted keys of a table."""
    return {f"{section}.{name}".lstrip(".") for section, names in table.items() for name in names.split()}
