"""What `make kernels` reads out of compilers' words. The samples are real, of ptxas and cuobjdump 13, shortened."""
# ruff: noqa: E501

import json

import pytest

from benchmarks import kernels

FINE = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7jaxkern4cuda5entryINS0_4gemm6KernelILi0ELi64EEEEEvNT_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN7jaxkern4cuda5entryINS0_4gemm6KernelILi0ELi64EEEEEvNT_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compile time = 11.715 ms
"""
STACK = """\
ptxas warning : Local memory used for function '_ZN7jaxkern4cuda5entryINS0_4gemm5LocalEEEvNT_6ParamsE', size of stack frame: 1200 bytes
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7jaxkern4cuda5entryINS0_4gemm5LocalEEEvNT_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN7jaxkern4cuda5entryINS0_4gemm5LocalEEEvNT_6ParamsE
    1200 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 211 registers, used 1 barriers, 1200 bytes cumulative stack size, 1024 bytes smem
"""
SPILL = """\
ptxas info    : Compiling entry function '_ZN7jaxkern4cuda5entryINS0_4gemm5SpillILi96EEEEEvNT_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN7jaxkern4cuda5entryINS0_4gemm5SpillILi96EEEEEvNT_6ParamsE
    128 bytes stack frame, 124 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes cumulative stack size
"""
# A function that is no kernel, and was not inlined.
CALLED = """\
ptxas info    : Function properties for _ZN7jaxkern4cuda4gemm3farERA4_fmm
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
REPAIRED = [
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to wgmma "
    "pipeline crossing function boundary at a function call in the function '_ZN7jaxkern4cuda4gemm3farERA4_fmm'",
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_ZN7jaxkern4cuda4gemm3farERA4_fmm'",
    "ptxas info    : (C7517) warpgroup.wait is injected in around line 41 by compiler to allow use of registers "
    "defined by GMMA in function '_ZN7jaxkern4cuda4gemm3farERA4_fmm'",
    "ptxas info    : (C7519) warpgroup.arrive is injected in around line 45 by compiler to allow use of registers in "
    "GMMA in function '_ZN7jaxkern4cuda4gemm3farERA4_fmm'",
    "ptxas info    : (C7507) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.",
]
SASS = """
	code for sm_90a
	.target	sm_90a

		Function : _ZN7jaxkern4cuda5entryINS0_4gemm6KernelILi0ELi64EEEEEvNT_6ParamsE
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*00c0*/                   R2UR UR7, R0.reuse ;                                      /* 0x00000000000772ca */
                                                                                             /* 0x048fe400000e0000 */
        /*0100*/                   QGMMA.64x8x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT ;   /* 0x00000000041879f3 */
                                                                                             /* 0x000fe2000c7008ff */
        /*0130*/                   QGMMA.64x8x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24, gsb0 ;  /* 0x00000000041879f3 */
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                           /* 0x00008000000079f1 */
        /*0150*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;      /* 0x00000000141879f0 */
        /*0160*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;        /* 0x000000003fff79f0 */
        /*0170*/                   @!UP1 UTMALDG.2D [UR8], [UR4] ;                           /* 0x00000008040095b4 */
        /*10180*/                  UTMASTG.2D [UR4], [UR8] ;                                 /* 0x00000004080073b5 */
		Function : _ZN7jaxkern4cuda5entryINS0_4gemm5SpillILi96EEEEEvNT_6ParamsE
        /*02b0*/                   STL.64 [R1+0x30], R48 ;                                   /* 0x0000303001007387 */
        /*0440*/                   STL [R1+0x4c], R37 ;                                      /* 0x00004c2501007387 */
        /*0460*/                   LDL.LU R3, [R1] ;                                         /* 0x0000000001037983 */
        /*0500*/                   STS [R1+0x44], R6 ;                                       /* 0x0000440601007388 */
"""
ELF = """
.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	function: 0x8	register count: 30
.nv.info._ZN7jaxkern4cuda5entryINS0_4gemm6KernelILi0ELi64EEEEEvNT_6ParamsE
	<0x1>
	Attribute:	EIATTR_CUDA_API_VERSION
	Format:	EIFMT_SVAL
	Value:	0x82
	<0x8>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x180 0x1 0x1 
.nv.callgraph
"""  # noqa: W291
KERNEL = "_ZN7jaxkern4cuda5entryINS0_4gemm6KernelILi0ELi64EEEEEvNT_6ParamsE"
SPILLING = "_ZN7jaxkern4cuda5entryINS0_4gemm5SpillILi96EEEEEvNT_6ParamsE"


def test_ptxas():
    found = kernels.parse_ptxas(FINE + STACK + CALLED)
    assert found[KERNEL] == dict(registers=30, stack=0, spill_stores=0, spill_loads=0, shared_memory=0)
    local = found["_ZN7jaxkern4cuda5entryINS0_4gemm5LocalEEEvNT_6ParamsE"]
    assert local == dict(registers=211, stack=1200, spill_stores=0, spill_loads=0, shared_memory=1024)
    assert "registers" not in found["_ZN7jaxkern4cuda4gemm3farERA4_fmm"]


def test_a_sound_kernel_is_not_refused():
    assert kernels.refusals(FINE) == []


@pytest.mark.parametrize("line", REPAIRED, ids=lambda line: line[17:22])
def test_what_ptxas_repaired_is_refused(line):
    (refused,) = kernels.refusals(line + "\n" + FINE)
    assert line[16:23] in refused


@pytest.mark.parametrize(
    "log, words",
    [
        (STACK, "stack 1200 bytes"),
        (SPILL, "stack 128 bytes, spill stores 124 bytes, spill loads 120 bytes"),
        (CALLED, "stack 16 bytes"),
    ],
)
def test_spills_and_stack_frames_are_refused(log, words):
    (refused,) = kernels.refusals(FINE + log)
    assert refused.endswith(": " + words)


def test_sass():
    none = dict(qgmma=0, hgmma=0, ldl=0, stl=0, utmaldg=0, utmastg=0)
    assert kernels.parse_sass(SASS) == {
        KERNEL: none | dict(qgmma=2, hgmma=1, utmaldg=1, utmastg=1),
        SPILLING: none | dict(stl=2, ldl=1),
    }
    assert kernels.parse_threads(ELF) == {KERNEL: 384}


@pytest.mark.parametrize(
    "demangled, name",
    [
        (
            "void jaxkern::cuda::entry<jaxkern::cuda::gemm::Kernel<128, (jaxkern::cuda::Float)1, true> >"
            "(jaxkern::cuda::gemm::Kernel<128, (jaxkern::cuda::Float)1, true>::Params)",
            "Gemm<128, (Float)1, true>",
        ),
        (
            "void jaxkern::cuda::entry<jaxkern::cuda::kernels::Dense<64, jaxkern::cuda::Pair<float> > >"
            "(jaxkern::cuda::kernels::Dense<64, jaxkern::cuda::Pair<float> >::Params)",
            "Dense<64, Pair<float>>",
        ),
        (
            "void jaxkern::cuda::entry<jaxkern::cuda::(anonymous namespace)::Local>"
            "(jaxkern::cuda::(anonymous namespace)::Local::Params)",
            "Local",
        ),
        ("jaxkern::cuda::Dense<64, true>", "Dense<64, true>"),
        ("Gemm", "Gemm"),
    ],
)
def test_names(demangled, name):
    assert kernels.short_name(demangled) == name


STATISTICS = """{"kernels": {"jaxkern::cuda::Dense<64, true>": {"launches": 2, "blocks": 12, "threads": 256,
  "shared_bytes": 4096, "least_bytes": 1000, "moved_bytes": 1500, "shared_accesses": 30, "bank_conflicts": 2, "wgmma": 4,
  "cycles": 100, "tensor_busy": 0.5, "idle": {"warpgroup 0": 0.25}, "seeds": [0, 3]}}}"""


def test_simulator_and_compiler_in_one_row():
    simulated = kernels.simulator_rows(json.loads(STATISTICS))
    compiled = {"Dense<64, true>": kernels.Row("Dense<64, true>", registers=168, threads=256, shared_memory=0)}
    (row,) = kernels.merge(compiled, simulated)
    assert row == kernels.Row(
        "Dense<64, true>",
        registers=168,
        threads=256,
        shared_memory=4096,
        seeds=[0, 3],
        least_bytes=500,
        moved_bytes=750,
        bank_conflicts=1,
        tensor_busy=0.5,
        idle={"warpgroup 0": 0.25},
    )
    assert kernels.table([row]).splitlines()[1].split("  ")[-1] == "1"


def test_either_alone():
    compiled = {"A": kernels.Row("A", registers=24)}
    assert kernels.merge(compiled, {}) == [compiled["A"]]
    assert kernels.merge({}, {"B": kernels.Row("B")}) == [kernels.Row("B")]


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernels, "simulate", lambda: (kernels.simulator_rows(json.loads(STATISTICS)), ""))
    assert kernels.main([]) == 0
    out = capsys.readouterr().out
    assert "nvcc is neither in PATH nor in CUDA_HOME" in out and "Dense<64, true>" in out


def test_a_wrong_result_on_the_simulator_is_refused(monkeypatch):
    right = kernels.reference_of
    monkeypatch.setattr(kernels, "reference_of", lambda call: [x * 1.1 for x in right(call)])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        kernels.simulate(seeds=1)
