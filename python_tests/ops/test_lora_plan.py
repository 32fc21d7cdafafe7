"""plan_lora at the boundaries of the fused low-rank kernels' domain, for devices that are not there."""

import pytest
import torch

from alore_ext import ops


class TestPlan:
    H200 = {"num_processors": 132, "shared_bytes": 232448}
    ADA = {"num_processors": 142, "shared_bytes": 101376}

    def plan(self, in_features, out_features, rank, dtype=torch.bfloat16, weight=None, tokens=50432, **device):
        empty = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
        return ops.plan_lora(
            empty(tokens, in_features, dtype=dtype),
            empty(out_features, in_features, dtype=weight or dtype),
            empty(rank, in_features, dtype=torch.float32),
            **device,
        )

    @pytest.mark.parametrize(
        ("in_features", "out_features", "rank", "paths"),
        [
            (768, 2304, 8, ("extended", "staged")),  # ViT-B qkv
            (128, 384, 8, ("extended", "staged")),  # Swin-B's first stage
            (768, 2304, 1, ("extended", "staged")),
            (768, 2336, 8, ("extended", "fused")),
            (800, 2304, 8, ("extended", "fused")),
            (768, 776, 8, ("extended", "fused")),
            (768, 768, 8, ("fused", "staged")),
            (3072, 768, 8, ("fused", "fused")),
            (1024, 3072, 8, ("extended", "fused")),  # ViT-L
            (1024, 4096, 8, ("extended", "fused-half")),
            (768, 768, 9, ("fused", "fused")),
            (768, 2304, 9, ("extended", "fused-half")),
            (768, 2304, 16, ("extended", "fused-half")),
            (768, 3072, 16, ("extended", "gemm")),
            (768, 2304, 17, ("gemm", "gemm")),
            (768, 2300, 8, ("gemm", "gemm")),
            (764, 2304, 8, ("gemm", "gemm")),
        ],
    )
    def test_domain_of_the_fused_kernels(self, in_features, out_features, rank, paths):
        plan = self.plan(in_features, out_features, rank, **self.H200)
        assert (plan.forward, plan.backward) == paths, plan
        assert plan.shared_bytes <= self.H200["shared_bytes"]
        assert self.plan(in_features, out_features, rank).backward == "gemm"  # no GPU

    def test_other_dtypes_and_devices(self):
        assert self.plan(768, 2304, 8, torch.float32, **self.H200).forward == "gemm"
        assert self.plan(768, 2304, 8, torch.float16, **self.H200).backward == "staged"
        ada = self.plan(768, 2304, 8, **self.ADA)
        assert (ada.forward, ada.backward) == ("extended", "gemm")
        assert self.plan(128, 384, 8, **self.ADA).backward == "staged"

    def test_fold(self):
        plan = self.plan(768, 2304, 8, weight=torch.float32, **self.H200)
        assert (plan.forward, plan.backward) == ("fold", "staged")
        assert (plan.code_width, plan.operand_elements) == (0, 768 * 2304)
        assert self.plan(768, 2304, 8, torch.float32).forward == "gemm"

    @pytest.mark.parametrize("tokens", [0, 1, 16, 17, 197, 50432])
    def test_blocks_and_memory(self, tokens):
        plan = self.plan(768, 2304, 8, tokens=tokens, **self.H200)
        assert plan.blocks == min(132, max(1, -(-tokens // 16)))
        partial = plan.blocks * (768 + 2304) * 8 * 4
        assert partial <= plan.workspace_bytes <= partial + 2304 * 4 + tokens * 16 + 5 * 256
        assert plan.code_width == 8
        narrow = self.plan(128, 384, 8, tokens=tokens, **self.H200)  # four tiles of 16 tokens at a time
        assert narrow.blocks == min(132, max(1, -(-tokens // 64)))
        assert (plan.staged_shape, narrow.staged_shape) == (2, 0) and "staged_shape=0" in repr(narrow)

    def test_prints_what_it_holds(self):
        plan = self.plan(768, 2304, 8, **self.H200)
        for name in ("forward", "backward", "code_width", "blocks", "workspace_bytes"):
            assert f"{name}={getattr(plan, name)}" in repr(plan)
