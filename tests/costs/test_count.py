"""FLOPs, bytes and collectives of programs written by hand, each counted by hand beside it."""

from __future__ import annotations

import pytest

from popo_jax.costs.count import count, group_size
from popo_jax.costs.hlo import Array, parse
from popo_jax.costs.kernels import kernel_flops

LOOP = """HloModule m

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/dot"}
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %y)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] BOUND
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(1)
  %begin = s32[] copy(%zero)
  %init = (s32[], f32[4,8]{1,0}) tuple(%begin, %x)
  %loop = (s32[], /*index=1*/f32[4,8]{1,0}) while(%init), condition=%condition, body=%body, frontend_attributes={kernel_metadata={

}}, metadata={op_name="jit(f)/while"}
  ROOT %r = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def counted(text: str, trips: float = 1.0):
    return count(parse(text), trips=lambda _: trips, kernel=kernel_flops)


def test_a_loop_counts_as_often_as_it_runs():
    """From 1 below 10 in steps of 2: five times; a product of [4, 8] and [8, 8] is 2 x 4 x 8 x 8 FLOPs."""
    c = counted(LOOP.replace("BOUND", "constant(10)"))
    assert c.matmul == 5 * 2 * 4 * 8 * 8
    assert c.bytes == 5 * 4 * (3 + 32 + 32 + 64) + 2 * 4  # the counter, x, y, w; the copy before


def test_a_loop_to_a_number_that_is_data_counts_as_it_is_told():
    assert counted(LOOP.replace("BOUND", "get-tuple-element(%p), index=0"), trips=7).matmul == 7 * 2 * 4 * 8 * 8


def entry(*lines: str, before: str = "") -> str:
    return f"HloModule m\n\n{before}\nENTRY %main () -> f32[] {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


CONVOLUTIONS = [
    # [8, 16, 32] x [32, 64]: rows as a spatial dimension with a window of 1
    ("f32[8,16,64]", "f32[8,16,32]", "f32[32,64,1]", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 8 * 16 * 32 * 64),
    # contraction over a window of 2
    ("f32[16,64,1]", "f32[2,16,32]", "f32[2,32,64]", "window={size=2}, dim_labels=0bf_0io->bf0", 2 * 2 * 16 * 32 * 64),
    # full padding of a window of 3 over 3: of the 5 x 3 positions the 3 x 3 on an element, as in a product of polynomials
    (
        "f32[5,5,7]",
        "f32[3,5,11]",
        "f32[3,11,7]",
        "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
        2 * 9 * 5 * 7 * 11,
    ),
    # holes between elements do not count: 4 results, 3 of 5 places filled
    ("f32[1,5,1]", "f32[1,3,1]", "f32[1,1,1]", "window={size=1 lhs_dilate=2}, dim_labels=b0f_0io->b0f", 2 * 3),
]


@pytest.mark.parametrize(("out", "lhs", "rhs", "how", "flops"), CONVOLUTIONS)
def test_products_written_as_convolutions(out, lhs, rhs, how, flops):
    text = entry(f"%l = {lhs}{{2,1,0}} parameter(0)", f"%r = {rhs} parameter(1)", f"ROOT %c = {out} convolution(%l, %r), {how}")
    assert counted(text).matmul == flops


GROUPS = [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
    ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", 2),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=3,'axis_2'=4] {'axis_0','axis_2'}, dimensions={0}", 8),
    ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_1'}, dimensions={0}", 8),
    ("source_target_pairs={{0,1},{1,2}}", 2),
    ("replica_groups={}, to_apply=%add", 0),
]


@pytest.mark.parametrize(("attributes", "size"), GROUPS)
def test_how_many_take_part(attributes, size):
    assert group_size(attributes) == size


def test_collectives_are_told_with_the_whole_that_travels():
    scatter = """%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %r = bf16[64,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %z = s32[] constant(0)
  ROOT %s = bf16[16,8]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={16,8}
}
"""
    text = entry(
        "%x = bf16[16,8]{1,0} parameter(0)",
        "%g = bf16[64,8]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}",
        "%f = bf16[16,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1",
        "%a = (f32[3]{0}, f32[5]{0}) all-reduce(%u, %v), replica_groups={{0,1}}, to_apply=%add",
        "ROOT %q = f32[] constant(0)",
        before=scatter,
    )
    found = [(c.kind, c.bytes, c.group) for c in counted(text).collectives]
    assert found == [("all-gather", 64 * 8 * 2, 4), ("reduce-scatter", 64 * 8 * 2, 4), ("all-reduce", 8 * 4, 2)]


def test_of_branches_the_most_expensive_counts_and_transfers_to_the_host_are_found():
    branches = "".join(
        f"%b{n} (p: f32[{n},8]) -> f32[{n},8] {{\n  %p = f32[{n},8] parameter(0)\n  %o = token[] outfeed(%p, %t)\n"
        f"  ROOT %y = f32[{n},8] dot(%p, %p), lhs_contracting_dims={{1}}\n}}\n\n"
        for n in (2, 4)
    )
    text = entry("ROOT %c = f32[4,8] conditional(%i, %x, %y), branch_computations={%b2, %b4}", before=branches)
    c = counted(text)
    assert c.matmul == 2 * 4 * 8 * 8 and c.host == ["o"]


def test_what_is_sliced_or_updated_in_place_moves_only_its_part():
    inner = """%sliced (a: f32[100,8], b: f32[1,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %twice = f32[1,8]{1,0} add(%b, %b)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%a, %twice, %i, %i)
}
"""
    text = entry(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%b = f32[1,8]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        "ROOT %f = f32[100,8]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%sliced",
        before=inner,
    )
    assert counted(text).bytes == 4 * (8 + 1) + 4 * 8  # b and i read, a row written


SPLASH = '%{name}.1 = bf16[2,3,512,64]{{3,2,1,0}} custom-call(%b, %q, %k), custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize(("name", "products"), [("splash_mha_fwd", 2), ("splash_mqa_dq_no_residuals", 3), ("splash_mqa_dkv", 4)])
@pytest.mark.parametrize(("blocks", "share"), [("1,4,4", 10 / 16), ("1,4,2", 2 / 4), ("1,1,1", 1.0)])
def test_attention_kernels_are_counted_from_their_shapes(name, products, blocks, share):
    text = entry(
        f"%b = s8[{blocks}] parameter(0)",
        "%q = bf16[2,3,512,64] parameter(1)",
        "%k = bf16[2,512,64] parameter(2)",
        "ROOT " + SPLASH.format(name=name),
    )
    c = counted(text)
    assert c.kernels == products * 2 * 2 * 3 * 512 * 512 * 64 * share and c.unknown == []


def test_a_kernel_that_is_not_known_is_named():
    c = counted(entry("%q = f32[2,2] parameter(0)", "ROOT " + SPLASH.format(name="other")))
    assert c.kernels == 0 and c.unknown == ["other.1"]


def test_the_text_is_taken_apart():
    module = parse(LOOP.replace("BOUND", "constant(10)"))
    assert module.entry == "main" and set(module.computations) == {"body", "condition", "main"}
    loop = module.computations["main"].instructions["loop"]
    assert loop.op == "while" and loop.results == (Array("s32", ()), Array("f32", (4, 8))) and loop.source == "jit(f)/while"
    assert module.computations["body"].root.name == "out"
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule m")
