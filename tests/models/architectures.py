"""The table of tiny models, in the notation of :mod:`.spec`. Names follow llama.cpp's `src/models`."""

from __future__ import annotations

from .spec import TOP, Spec

# What many architectures share.
ATTN = "attn_norm:D attn_q:D,A attn_k:D,G attn_v:D,G attn_output:A,D "
HEAD_NORMS = "attn_q_norm:K attn_k_norm:K "
FULL_NORMS = "attn_q_norm:A attn_k_norm:G "
QKV_BIAS = "attn_q.bias:A attn_k.bias:G attn_v.bias:G "
MLA = (
    "attn_norm:D attn_q_a:D,Q attn_q_a_norm:Q attn_q_b:Q,HM attn_kv_a_mqa:D,CR attn_kv_a_norm:C "
    "attn_k_b:N,C,H attn_v_b:C,W,H attn_output:HW,D "
)
FFN = "ffn_norm:D ffn_gate:D,F ffn_up:D,F ffn_down:F,D "
ROUTER = "ffn_gate_inp:D,E "
EXPERTS = "ffn_gate_exps:D,X,E ffn_up_exps:D,X,E ffn_down_exps:X,D,E "
FUSED = "ffn_gate_up_exps:D,XX,E ffn_down_exps:X,D,E "
MOE = "ffn_norm:D " + ROUTER + EXPERTS
SHARED = "ffn_gate_shexp:D,S ffn_up_shexp:D,S ffn_down_shexp:S,D "
PROBS_B = "exp_probs_b.bias:E "
SCALES = "ffn_gate_exps.scale:E ffn_up_exps.scale:E ffn_down_exps.scale:E "
NEXTN = "nextn.eh_proj.weight:2D,D nextn.enorm.weight:D nextn.hnorm.weight:D "
TIED = "token_embd:D,V output_norm:D "

# Layers that belong to one architecture.
LITE = "attn_norm:D attn_q:D,HM attn_kv_a_mqa:D,CR attn_kv_a_norm:C attn_kv_b:C,HNW attn_output:HW,D "
DENSE_FFN = "ffn_gate:D,F ffn_up:D,F ffn_down:F,D "
GLM = ATTN + QKV_BIAS + HEAD_NORMS + "post_attention_norm:D "
GLM_MOE = ROUTER + EXPERTS + SHARED + PROBS_B
BAILING = "attn_norm:D attn_qkv:D,AGG attn_output:A,D " + HEAD_NORMS
CONV = "attn_norm:D shortconv.conv.weight:3,D shortconv.in_proj.weight:D,3D shortconv.out_proj.weight:D,D "
NEMOTRON = (
    "attn_norm:D ffn_latent_down:D,L ffn_latent_up:L,D ffn_up_shexp:D,S ffn_down_shexp:S,D "
    + ROUTER
    + PROBS_B
)
MAMBA = (
    "attn_norm:D ssm_in:D,DII ssm_conv1d:4,DI ssm_conv1d.bias:DI ssm_x:DI,DX ssm_dt_norm:DT ssm_dt:DT,DI "
    "ssm_dt.bias:DI ssm_b_norm:ST ssm_c_norm:ST ssm_a.:ST,DI ssm_d.:DI ssm_out:DI,D "
)
MAMBA2 = (
    "attn_norm:D ssm_in:D,IN ssm_conv1d:4,CD ssm_conv1d.bias:CD ssm_dt.bias:NH ssm_a.:1,NH ssm_d.:1,NH "
    "ssm_norm:DI,1 ssm_out:DI,D "
)
DEEPSEEK4 = (
    "attn_norm:D attn_sinks:H attn_q_a:D,Q attn_q_a_norm:Q attn_q_b:Q,A attn_kv:D,K attn_kv_a_norm:K "
    "attn_output_a:OI,OO attn_output_b:OO,D hc_attn_fn:HD,HX hc_attn_base:HX hc_attn_scale:3 "
    "hc_ffn_fn:HD,HX hc_ffn_base:HX hc_ffn_scale:3 " + MOE + SHARED
)
COMPRESSED = (
    "attn_compressor_kv:D,K attn_compressor_gate:D,K attn_compressor_ape:K,128 attn_compressor_norm:K "
)
INDEXED = (
    "attn_compressor_kv:D,2K attn_compressor_gate:D,2K attn_compressor_ape:2K,4 attn_compressor_norm:K "
    "indexer.proj.weight:D,4 indexer.attn_q_b.weight:Q,HI indexer_compressor_kv:D,2I "
    "indexer_compressor_gate:D,2I indexer_compressor_ape:2I,4 indexer_compressor_norm:I "
)

DENSE = Spec(
    "llama",
    "no experts at all",
    (ATTN + FFN,) * 2,
    keys="expert_count=null expert_used_count=null expert_feed_forward_length=null",
)

ARCHITECTURES: dict[str, Spec] = {
    "llama": Spec(
        "llama",
        "Mixtral: 8 experts, top 2, one format per weight",
        (ATTN + MOE,) * 3,
        quants=("Q4_0 Q4_0 Q8_0", "Q5_0 Q8_0 F16", "F32"),
        keys="feed_forward_length=96",
        chat=True,
    ),
    "olmoe": Spec(
        "olmoe",
        "16 experts, top 4, softmax without renormalisation, no chat template",
        (ATTN + FULL_NORMS + MOE,) * 4,
        quants=("Q4_0", "Q8_0", "Q5_0", "Q4_0 Q4_0 Q5_1"),
        sizes="E=16 T=4 J=4",
        keys="feed_forward_length=96",
    ),
    "qwen2moe": Spec(
        "qwen2moe",
        "shared expert with a gate of its own, biases on q, k and v",
        (ATTN + QKV_BIAS + MOE + SHARED + "ffn_gate_inp_shexp:D",) * 3,
        quants=("Q5_0", "Q4_0 Q8_0 Q5_0", "F16"),
        sizes="E=12 T=4 S=160",
        keys="expert_shared_feed_forward_length=160",
        chat=True,
    ),
    "deepseek2": Spec(
        "deepseek2",
        "MLA, leading dense layer, shared expert, sigmoid gating, selection bias, 2 of 4 groups of experts",
        (MLA + FFN, *(MLA + MOE + SHARED + PROBS_B,) * 3),
        quants=("Q4_0", "Q8_0", "Q4_0 Q5_0 Q8_0"),
        sizes="E=16 T=4 J=1 S=192 Q=32 C=32 R=16 N=32 W=32 CR=48 HM=192 HW=128",
        keys=(
            "attention.q_lora_rank=32 attention.kv_lora_rank=32 attention.key_length=48 "
            "attention.value_length=32 attention.key_length_mla=48 attention.value_length_mla=32 "
            "rope.dimension_count=16 leading_dense_block_count=1 expert_shared_count=2 "
            "expert_weights_scale=2.5 expert_weights_norm=true expert_gating_func=2 expert_group_count=4 "
            "expert_group_used_count=2"
        ),
    ),
    "gpt-oss": Spec(
        "gpt-oss",
        "MXFP4 experts with biases on gate, up and down, router bias, attention sinks, sliding window of 8",
        (
            ATTN + QKV_BIAS + "attn_output.bias:D attn_sinks:H post_attention_norm:D ffn_gate_inp.bias:E "
            "ffn_gate_exps.bias:X,E ffn_up_exps.bias:X,E ffn_down_exps.bias:D,E " + ROUTER + EXPERTS,
        )
        * 4,
        quants=("MXFP4", "MXFP4", "MXFP4 MXFP4 Q8_0"),
        sizes="T=4 E=12",
        keys="attention.sliding_window=8",
        chat=True,
    ),
    "cohere2moe": Spec(
        "cohere2moe",
        "fused gate_up, parallel attention and FFN, leading dense layer, shared expert, sliding window",
        (
            ATTN + DENSE_FFN,
            *(ATTN + ROUTER + FUSED + SHARED,) * 3,
        ),
        quants=("Q4_0", "Q8_0", "Q5_0 Q4_0"),
        sizes="T=3",
        keys=(
            "attention.sliding_window=8 attention.sliding_window_pattern=2 logit_scale=1.0 "
            "attention.layer_norm_epsilon=1e-05 leading_dense_block_count=1 expert_shared_count=1 "
            "expert_shared_feed_forward_length=96 expert_weights_norm=true"
        ),
    ),
    "deepseek2-lite": Spec(
        "deepseek2",
        "full-rank q, unsplit kv_b of old files, softmax gating, leading dense layer, no selection bias",
        (LITE + FFN, *(LITE + MOE + SHARED,) * 2),
        quants=("Q5_0 Q5_0 Q8_0", "Q4_0"),
        sizes="E=8 T=3 J=4 S=96 C=32 CR=48 HM=192 HW=128 HNW=256",
        keys=(
            "attention.q_lora_rank=0 attention.kv_lora_rank=32 attention.key_length=48 "
            "attention.value_length=32 rope.dimension_count=16 leading_dense_block_count=1 "
            "expert_shared_count=1 expert_weights_scale=1.0 expert_gating_func=1"
        ),
        chat=True,
    ),
    "qwen3moe": Spec(
        "qwen3moe",
        "K-quants (rows of 256), renormalised weights, head size that is not D / H",
        (ATTN + HEAD_NORMS + MOE,) * 3,
        quants=("Q4_K Q4_K Q8_0", "Q6_K Q5_K Q4_0", "Q3_K IQ4_XS IQ4_NL"),
        sizes="D=256 X=32 E=16 T=4 K=32",
        rest="Q4_K",
    ),
    "nvfp4": Spec(
        "qwen3moe",
        "a scale per expert on gate, up and down, as NVFP4 files have",
        (ATTN + HEAD_NORMS + MOE + SCALES,) * 2,
        quants=("NVFP4", "NVFP4 NVFP4 Q8_0"),
        sizes="X=192 E=12 T=3",
    ),
    "aligned": Spec(
        "olmoe",
        "tensors aligned to 4096 bytes; slices of whole pages and of odd sizes",
        (ATTN + FULL_NORMS + MOE,) * 3,
        quants=("F16", "Q8_0 F16 Q4_0", "BF16"),
        sizes="X=64 J=4",
        keys="feed_forward_length=64",
        alignment=4096,
    ),
    "glm4moe": Spec(
        "glm4moe",
        "leading dense layer, shared expert, a prediction layer whose experts are never loaded",
        (GLM + DENSE_FFN, *(GLM + GLM_MOE,) * 2, GLM + GLM_MOE + NEXTN),
        quants=("Q4_0", "Q8_0 Q4_0 Q5_1"),
        sizes="E=12 T=3",
        keys=(
            "leading_dense_block_count=1 expert_shared_count=1 expert_weights_norm=true "
            "expert_weights_scale=1.5 expert_gating_func=2 nextn_predict_layers=1 rope.dimension_count=8"
        ),
        chat=True,
    ),
    "granitemoe": Spec(
        "granitemoe",
        "tied embeddings, shared expert, scaled embedding, residual and logits",
        (ATTN + MOE + SHARED,) * 2,
        quants=("Q8_0", "Q4_0"),
        sizes="E=10 T=4",
        keys=(
            "feed_forward_length=96 expert_shared_feed_forward_length=96 logit_scale=2.0 residual_scale=0.5 "
            "embedding_scale=1.5 attention.scale=0.25"
        ),
        top=TIED,
    ),
    "phimoe": Spec(
        "phimoe",
        "layer norms with biases, biases on all of attention and on the logits",
        (ATTN + QKV_BIAS + "attn_output.bias:D attn_norm.bias:D ffn_norm.bias:D " + MOE,) * 2,
        quants=("Q4_1", "Q5_0"),
        sizes="E=16 T=2",
        keys="feed_forward_length=96",
        top=TOP + "output_norm.bias:D output.bias:V",
    ),
    "gemma4": Spec(
        "gemma4",
        "fused gate_up with a scale per expert on down, router beside a dense FFN, tied, sliding window",
        (
            ATTN + HEAD_NORMS + "post_attention_norm:D " + FFN + "post_ffw_norm:D ffn_gate_inp.scale:D "
            "pre_ffw_norm_2:D post_ffw_norm_1:D post_ffw_norm_2:D ffn_down_exps.scale:E " + ROUTER + FUSED,
        )
        * 3,
        quants=("Q4_0", "Q8_0 Q5_0"),
        sizes="E=12 T=3 X=32",
        keys=(
            "attention.sliding_window=8 attention.sliding_window_pattern=[true,true,false] "
            "attention.key_length_swa=16 attention.value_length_swa=16 rope.freq_base_swa=10000.0 "
            "rope.dimension_count_swa=16 embedding_length_per_layer_input=0 final_logit_softcapping=30.0"
        ),
        top=TIED + "rope_freqs:8",
        chat=True,
    ),
    "llama4": Spec(
        "llama4",
        "one expert per token, weights applied before the FFN, every other layer dense, shared expert",
        (ATTN + FFN, ATTN + MOE + SHARED) * 2,
        quants=("Q4_0", "Q8_0"),
        sizes="T=1 E=16",
        keys="interleave_moe_layer_step=2",
    ),
    "bailingmoe2": Spec(
        "bailingmoe2",
        "fused qkv, expert groups, selection bias, leading dense layer",
        (BAILING + FFN, *(BAILING + MOE + SHARED + PROBS_B,) * 2),
        quants=("Q4_0 Q8_0 Q5_0", "Q5_0"),
        sizes="E=16 T=4 AGG=128",
        keys=(
            "leading_dense_block_count=1 expert_shared_count=1 expert_weights_scale=2.5 "
            "expert_weights_norm=true expert_gating_func=2 expert_group_count=4 expert_group_used_count=2"
        ),
    ),
    "ernie4_5-moe": Spec(
        "ernie4_5-moe",
        "leading dense layer, shared expert, softmax with a selection bias",
        (ATTN + FFN, *(ATTN + MOE + SHARED + PROBS_B,) * 2),
        quants=("Q4_0", "Q5_1"),
        sizes="T=3",
        keys="leading_dense_block_count=1 interleave_moe_layer_step=1 expert_shared_feed_forward_length=96",
    ),
    "dots1": Spec(
        "dots1",
        "K-quants on down only, a head of keys per head, sigmoid gating, leading dense layer",
        (ATTN + HEAD_NORMS + FFN, *(ATTN + HEAD_NORMS + MOE + SHARED + PROBS_B,) * 2),
        quants=("Q4_0 Q4_0 Q6_K", "Q4_0 Q4_0 Q2_K"),
        sizes="X=256 S=256 J=4 T=3",
        keys=(
            "leading_dense_block_count=1 expert_shared_count=1 expert_weights_scale=1.5 "
            "expert_weights_norm=true expert_gating_func=2"
        ),
    ),
    "hunyuan-moe": Spec(
        "hunyuan-moe",
        "shared expert, normalised q and k",
        (ATTN + HEAD_NORMS + MOE + SHARED,) * 2,
        quants=("Q8_0", "Q4_0 Q4_0 Q8_0"),
        keys="feed_forward_length=96 expert_shared_feed_forward_length=96",
    ),
    "grovemoe": Spec(
        "grovemoe",
        "a second, smaller set of experts (chexps) picked from the same layer's router under the same names",
        (ATTN + HEAD_NORMS + MOE + "ffn_gate_chexps:D,Y,C ffn_up_chexps:D,Y,C ffn_down_chexps:Y,D,C",) * 2,
        quants=("Q4_0", "Q8_0"),
        sizes="E=16 T=4 C=8 Y=32",
        keys="experts_per_group=2 expert_group_scale=0.05 expert_chunk_feed_forward_length=32",
    ),
    "qwen3next": Spec(
        "qwen3next",
        "linear attention with full attention in turn, fused gate_up, gated shared expert",
        (
            "attn_norm:D post_attention_norm:D attn_qkv:D,C attn_gate:D,VD ssm_conv1d:4,C ssm_dt.bias:VH "
            "ssm_a.:VH ssm_ba:D,BA ssm_norm:ST ssm_out:VD,D ffn_gate_inp_shexp:D " + ROUTER + FUSED + SHARED,
            "attn_norm:D post_attention_norm:D attn_q:D,2A attn_k:D,G attn_v:D,G attn_output:A,D "
            "ffn_gate_inp_shexp:D " + HEAD_NORMS + ROUTER + FUSED + SHARED,
        )
        * 2,
        quants=("Q4_0", "Q8_0", "Q5_0 Q4_0"),
        sizes="E=16 T=4 ST=32 VH=4 VD=128 C=256 BA=8 2A=128",
        keys=(
            "expert_shared_feed_forward_length=96 full_attention_interval=2 ssm.conv_kernel=4 "
            "ssm.inner_size=128 ssm.state_size=32 ssm.time_step_rank=4 ssm.group_count=2"
        ),
        chat=True,
    ),
    "lfm2moe": Spec(
        "lfm2moe",
        "convolution layers and attention layers in turn, leading dense layer, tied",
        (
            CONV + FFN,
            ATTN + HEAD_NORMS + MOE + PROBS_B,
            CONV + MOE + PROBS_B,
        ),
        quants=("Q4_0", "Q8_0"),
        keys=(
            "leading_dense_block_count=1 expert_gating_func=2 shortconv.l_cache=3 "
            "attention.head_count_kv=[0,2,0]"
        ),
        top="token_embd:D,V token_embd_norm:D",
        sizes="T=3 3D=192",
    ),
    "minimax-m2": Spec(
        "minimax-m2",
        "selection bias on every layer, sigmoid gating, partial rotation",
        (ATTN + FULL_NORMS + MOE + PROBS_B,) * 2,
        quants=("IQ4_NL", "Q5_0"),
        sizes="E=16 T=4",
        keys="feed_forward_length=96 expert_gating_func=2 rope.dimension_count=8",
    ),
    "smallthinker": Spec(
        "smallthinker",
        "router that reads the layer's input before attention, ReLU experts",
        (ATTN + MOE,) * 3,
        quants=("Q4_0", "Q8_0", "Q5_0"),
        sizes="E=16 T=4",
        keys="expert_gating_func=2",
    ),
    "nemotron_h_moe": Spec(
        "nemotron_h_moe",
        "no gate weight; experts in a smaller latent space; top-k and sizes differ by layer; Mamba-2",
        (
            MAMBA2,
            NEMOTRON + "ffn_up_exps:L,X,E ffn_down_exps:X,L,E",
            ATTN,
            NEMOTRON + "ffn_up_exps:L,Y,E ffn_down_exps:Y,L,E",
        ),
        quants=("Q4_0", "Q8_0"),
        sizes="E=12 Y=160 L=32 IN=296 CD=160 NH=8 DI=128",
        keys=(
            "attention.layer_norm_epsilon=1e-05 attention.head_count=4 "
            "attention.head_count_kv=[0,0,2,0] feed_forward_length=[0,96,0,160] expert_used_count=[0,2,0,4] "
            "expert_feed_forward_length=[0,96,0,160] moe_latent_size=32 expert_shared_count=1 "
            "expert_shared_feed_forward_length=96 expert_weights_norm=true expert_weights_scale=2.5 "
            "ssm.conv_kernel=4 ssm.inner_size=128 ssm.state_size=16 ssm.time_step_rank=8 ssm.group_count=1"
        ),
    ),
    "jamba": Spec(
        "jamba",
        "Mamba layers with experts, attention layers with a dense FFN",
        (MAMBA + MOE, ATTN + FFN, MAMBA + MOE),
        quants=("Q4_0", "Q5_0"),
        sizes="F=96 DI=128 DII=256 DT=4 ST=16 DX=36",
        keys=(
            "feed_forward_length=96 attention.head_count_kv=[0,2,0] ssm.conv_kernel=4 ssm.inner_size=128 "
            "ssm.state_size=16 ssm.time_step_rank=4"
        ),
    ),
    "dbrx": Spec(
        "dbrx",
        "fused qkv that is clamped, layer norms",
        ("attn_norm:D attn_qkv:D,AGG attn_output:A,D attn_output_norm:D " + ROUTER + EXPERTS,) * 2,
        quants=("Q4_0", "F16"),
        sizes="E=16 T=4 AGG=128",
        keys="feed_forward_length=96 attention.layer_norm_epsilon=1e-05 attention.clamp_kqv=8.0",
    ),
    "arctic": Spec(
        "arctic",
        "a dense FFN beside the experts, each with its own norm",
        (ATTN + "ffn_gate:D,D ffn_up:D,D ffn_down:D,D ffn_norm_exps:D " + MOE,) * 2,
        quants=("Q5_0", "Q4_0"),
        keys="feed_forward_length=96",
    ),
    "grok": Spec(
        "grok",
        "GELU experts, capped attention and router logits",
        (ATTN + "attn_output_norm:D layer_output_norm:D " + MOE,) * 2,
        quants=("Q8_0", "Q4_0"),
        keys="feed_forward_length=96 embedding_scale=1.0 logit_scale=1.0 attention.output_scale=0.25",
    ),
    "deepseek4": Spec(
        "deepseek4",
        "a first layer whose experts follow from the token by a table, not from a router; hyper-connections",
        (DEEPSEEK4 + "ffn_gate_tid2eid:T,V", DEEPSEEK4 + PROBS_B + INDEXED, DEEPSEEK4 + PROBS_B + COMPRESSED),
        quants=("Q4_0", "Q8_0 Q8_0 Q4_0"),
        sizes="E=16 T=4 J=1 K=32 Q=32 OI=64 OL=32 OO=64 HD=256 HX=24 HC=4 HI=256 I=64 2I=128 2K=64",
        keys=(
            "attention.q_lora_rank=32 attention.sliding_window=32 rope.dimension_count=16 "
            "expert_shared_count=1 expert_weights_scale=1.5 expert_weights_norm=true expert_gating_func=4 "
            "swiglu_clamp_exp=10.0 attention.indexer.head_count=4 attention.indexer.key_length=64 "
            "attention.indexer.top_k=64 attention.output_group_count=2 attention.output_lora_rank=32 "
            "attention.compress_rope_freq_base=160000.0 attention.compress_ratios=[0,4,128] "
            "hyper_connection.count=4 hyper_connection.sinkhorn_iterations=2 hyper_connection.epsilon=1e-06 "
            "hash_layer_count=1"
        ),
        top=TOP + "output_hc_fn:HD,HC output_hc_base:HC output_hc_scale:1",
    ),
}
