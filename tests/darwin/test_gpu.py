"""The GPU through Metal: reached under the levels that grant it, and under no other."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from schemas.status import Gpu

from .conftest import Note
from .mac_help import Box, a_folder, driver, run

pytestmark = pytest.mark.darwin

# Compiles a kernel, runs it over 1,024 numbers, and checks each.
PROGRAM = r"""
#import <Foundation/Foundation.h>
#import <Metal/Metal.h>
#include <stdio.h>
int main(void) {
  @autoreleasepool {
    NSArray<id<MTLDevice>> *devices = MTLCopyAllDevices();
    if (devices.count == 0) { printf("no device\n"); return 3; }
    id<MTLDevice> device = devices[0];
    NSError *error = nil;
    NSString *source = @"kernel void add(device float *x [[buffer(0)]], uint i [[thread_position_in_grid]])"
                        " { x[i] += 1.0; }";
    id<MTLLibrary> library = [device newLibraryWithSource:source options:nil error:&error];
    if (library == nil) { printf("no compiler: %s\n", error.localizedDescription.UTF8String); return 4; }
    id<MTLComputePipelineState> state =
        [device newComputePipelineStateWithFunction:[library newFunctionWithName:@"add"] error:&error];
    if (state == nil) { printf("no pipeline: %s\n", error.localizedDescription.UTF8String); return 5; }
    id<MTLBuffer> buffer = [device newBufferWithLength:4096 options:MTLResourceStorageModeShared];
    float *numbers = buffer.contents;
    for (int i = 0; i < 1024; i++) numbers[i] = i;
    id<MTLCommandBuffer> commands = [[device newCommandQueue] commandBuffer];
    id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
    [encoder setComputePipelineState:state];
    [encoder setBuffer:buffer offset:0 atIndex:0];
    [encoder dispatchThreads:MTLSizeMake(1024, 1, 1) threadsPerThreadgroup:MTLSizeMake(64, 1, 1)];
    [encoder endEncoding];
    [commands commit];
    [commands waitUntilCompleted];
    for (int i = 0; i < 1024; i++) if (numbers[i] != i + 1) { printf("wrong at %d\n", i); return 6; }
    printf("%s\n", device.name.UTF8String);
    return 0;
  }
}
"""


@pytest.fixture
def box() -> Iterator[Box]:
    with a_folder() as folder:
        yield Box(folder)


@pytest.fixture
def program(box: Box) -> str:
    if shutil.which("clang") is None:
        pytest.skip("no clang: install the command line tools of Xcode")
    source, program = box.root / "gpu.m", box.rootfs / "gpu"
    source.write_text(PROGRAM)
    frameworks = ["-framework", "Metal", "-framework", "Foundation", "-framework", "CoreGraphics"]
    subprocess.run(["clang", "-fobjc-arc", "-o", str(program), str(source), *frameworks], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this session reaches no GPU without any sandbox: {done.stdout.strip()}")
    return str(program)


@pytest.mark.parametrize("level", [Gpu.METAL_COMPUTE, Gpu.MPS_ONLY])
def test_a_kernel_compiles_and_runs(box: Box, program: str, level: Gpu, note: Note) -> None:
    code, said = run(driver().plan(box.policy(gpu=level)), [program])
    note(f"gpu {level.value}", {"exit": code, "said": said[-500:]})
    assert code == 0


def test_without_the_grant_there_is_none(box: Box, program: str, note: Note) -> None:
    code, said = run(driver().plan(box.policy(gpu=Gpu.NONE)), [program])
    note("gpu none", {"exit": code, "said": said[-500:]})
    assert code != 0
