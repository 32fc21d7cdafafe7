"""Property tests: any supported shape gives the oracle's output and gradients (float64)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_close_to_oracle, kron_args, layer_norm_args, lora_args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROFILE = settings(max_examples=40, deadline=None, derandomize=True, database=None)

leads = st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)
small = st.integers(1, 7)
experts = st.integers(1, 32)
ranks = st.integers(1, 64)


@PROFILE
@given(experts, small, small, st.integers(1, 19), st.integers(1, 19), ranks, leads)
def test_kron_linear(num_experts, s_in, s_out, p_in, p_out, rank, lead):
    dims = (num_experts, s_in, s_out, p_in, p_out, rank)
    assert_close_to_oracle("kron_linear", kron_args(dims, lead, device=DEVICE))


@PROFILE
@given(experts, small, st.integers(1, 19), ranks, leads)
def test_alore(num_experts, s, p, rank, lead):
    assert_close_to_oracle("alore", kron_args((num_experts, s, s, p, p, rank), lead, device=DEVICE))


@PROFILE
@given(experts, small, st.integers(2, 19), ranks, leads, st.booleans(), st.booleans())
def test_layer_norm_alore(num_experts, s, p, rank, lead, has_weight, has_bias):
    args = layer_norm_args((num_experts, s, s, p, p, rank), lead, device=DEVICE)
    args |= {} if has_weight else {"weight": None}
    args |= {} if has_bias else {"bias": None}
    assert_close_to_oracle("layer_norm_alore", args, tolerance=1e-8)  # rows of 2 can have a tiny variance


@PROFILE
@given(st.integers(1, 40), st.integers(1, 40), ranks, leads, st.booleans())
def test_masked_lora_linear(in_features, out_features, rank, lead, has_bias):
    args = lora_args((in_features, out_features, rank), lead, device=DEVICE)
    assert_close_to_oracle("masked_lora_linear", args | ({} if has_bias else {"bias": None}))
