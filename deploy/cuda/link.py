"""Makes the libraries that a CUDA binary is linked with, out of nothing but the names of NVIDIA's functions.

    link.py FOLDER LIBCUDART_STATIC

A binary that is linked with NVIDIA's shared libraries does not start where one of them is missing, and the driver's is
missing on every machine without a card. Here each function is a jump through a table instead. An entry is filled when
its function is called first: from the shared library, opened by then; where there is none, with a function that returns
the library's own word for "not available". So one binary starts everywhere and finds out by itself what it has.

The names are those that the Rust bindings (package cudarc) declare. x86-64 only, like the wheels of the toolkit.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# Module of the bindings: name for the linker, files to open in this order, error code of what is not there.
LIBRARIES = {
    "driver": ("cuda", ["libcuda.so.1"], 100),  # CUDA_ERROR_NO_DEVICE
    "cublas": ("cublas", ["libcublas.so.13"], 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublaslt": ("cublasLt", ["libcublasLt.so.13"], 1),
    "curand": ("curand", ["libcurand.so.10"], 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nvrtc": ("nvrtc", ["libnvrtc.so.13"], 11),  # NVRTC_ERROR_INTERNAL_ERROR
}

RESOLVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

extern void *{name}_table[];
static const char *const names[] = {{ {names} }};
static const char *const files[] = {{ {files} }};

static int not_available(void) {{ return {code}; }}

/* Opened once: a file that is missing at the first call stays missing. Two threads that come at once open the same. */
__attribute__((visibility("hidden"))) void *{name}_find(size_t number) {{
    static void *library;
    static int tried;
    if (!__atomic_load_n(&tried, __ATOMIC_ACQUIRE)) {{
        void *opened = NULL;
        for (size_t i = 0; !opened && i < sizeof files / sizeof *files; i++) opened = dlopen(files[i], RTLD_NOW);
        __atomic_store_n(&library, opened, __ATOMIC_RELEASE);
        __atomic_store_n(&tried, 1, __ATOMIC_RELEASE);
    }}
    void *opened = __atomic_load_n(&library, __ATOMIC_ACQUIRE);
    void *found = opened ? dlsym(opened, names[number]) : NULL;
    if (!found) found = (void *)not_available;
    __atomic_store_n(&{name}_table[number], found, __ATOMIC_RELEASE);
    return found;
}}
"""

# A call arrives with its arguments in registers, which the search for its function must not lose.
ASSEMBLY = """
    .text
    .type {name}_first, @function
{name}_first:
    push %rdi
    push %rsi
    push %rdx
    push %rcx
    push %r8
    push %r9
    push %rax
    mov 56(%rsp), %rdi
    sub $136, %rsp
    movups %xmm0, (%rsp)
    movups %xmm1, 16(%rsp)
    movups %xmm2, 32(%rsp)
    movups %xmm3, 48(%rsp)
    movups %xmm4, 64(%rsp)
    movups %xmm5, 80(%rsp)
    movups %xmm6, 96(%rsp)
    movups %xmm7, 112(%rsp)
    call {name}_find
    mov %rax, %r11
    movups (%rsp), %xmm0
    movups 16(%rsp), %xmm1
    movups 32(%rsp), %xmm2
    movups 48(%rsp), %xmm3
    movups 64(%rsp), %xmm4
    movups 80(%rsp), %xmm5
    movups 96(%rsp), %xmm6
    movups 112(%rsp), %xmm7
    add $136, %rsp
    pop %rax
    pop %r9
    pop %r8
    pop %rcx
    pop %rdx
    pop %rsi
    pop %rdi
    add $8, %rsp
    jmp *%r11
{functions}
    .data
    .balign 8
    .hidden {name}_table
    .globl {name}_table
{name}_table:
{table}
    .section .note.GNU-stack,"",@progbits
"""

FUNCTION = """
    .globl {function}
    .type {function}, @function
{function}:
    jmp *{name}_table+{offset}(%rip)
{name}_first_{number}:
    push ${number}
    jmp {name}_first
"""


def bindings() -> pathlib.Path:
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--features", "model/cuda"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    found = [p["manifest_path"] for p in json.loads(listing.stdout)["packages"] if p["name"] == "cudarc"]
    if len(found) != 1:
        sys.exit(f"link.py: {len(found)} packages cudarc, expected 1")
    return pathlib.Path(found[0]).parent / "src"


def make(source: str, name: str, files: list[str], code: int, archive: pathlib.Path) -> int:
    functions = sorted(set(re.findall(r"\bfn ((?:cu|nvrtc)[A-Za-z]\w*)\(", source)))
    functions = [f for f in functions if f != "culib"]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        quoted = ", ".join(f'"{f}"' for f in functions)
        c = RESOLVER.format(name=name, names=quoted, files=", ".join(f'"{f}"' for f in files), code=code)
        (place / "find.c").write_text(c)
        jumps = (FUNCTION.format(function=f, name=name, number=i, offset=8 * i) for i, f in enumerate(functions))
        table = "\n".join(f"    .quad {name}_first_{i}" for i in range(len(functions)))
        (place / "jump.S").write_text(ASSEMBLY.format(name=name, functions="".join(jumps), table=table))
        for file in ("find.c", "jump.S"):
            subprocess.run(["cc", "-O2", "-fPIC", "-c", file], check=True, cwd=place)
        archive.unlink(missing_ok=True)
        subprocess.run(["ar", "rcs", archive, "find.o", "jump.o"], check=True, cwd=place)
    return len(functions)


def main() -> None:
    folder, runtime = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2])
    done = folder / "made"
    recipe = pathlib.Path(__file__).read_text()
    if done.exists() and done.read_text() == recipe:
        return
    source = bindings()
    folder.mkdir(parents=True, exist_ok=True)
    for module, (name, files, code) in LIBRARIES.items():
        count = make((source / module / "sys" / "mod.rs").read_text(), name, files, code, folder / f"lib{name}.a")
        print(f"toolkit: lib{name}.a, {count} functions", file=sys.stderr)
    # The runtime opens the driver by itself; under the name that it is asked for, it goes into the binary.
    shutil.copy(runtime, folder / "libcudart.a")
    done.write_text(recipe)


if __name__ == "__main__":
    main()
