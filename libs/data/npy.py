"""`.npy` files: arrays of numbers, and object arrays, as U-ViT's feature files are, without the danger of unpickling.

An object array is stored as a pickle, and a pickle may name any function to call. numpy's own pickles of arrays name
only four things; `read_objects` has its own stand-ins for these and refuses every other name, so no file runs code.
"""

import math
import os
import pickle
import re
from collections.abc import Sequence
from io import BytesIO
from typing import IO

import numpy as np

from libs.files import open_regular


def read_array(path: str, kinds: str = "f") -> np.ndarray:
    """The array of a plain `.npy` file, which is read whole; never unpickles.

    Args:
        kinds: numpy's letters of the types that are allowed, such as "f" for floating point and "iu" for integers.

    Raises:
        ValueError: the file is absent, damaged, or holds something else; the message names it.
    """
    try:
        with open_regular(path) as file:
            shape, fortran, dtype = read_header(file)
            if dtype.hasobject or dtype.kind not in kinds:
                raise ValueError(f"its numbers are of type {dtype}")
            size = math.prod(shape) * dtype.itemsize
            if size != os.fstat(file.fileno()).st_size - file.tell():  # before memory is asked for
                raise ValueError(f"its header promises {size} bytes of numbers, and it has more or fewer")
            data = np.frombuffer(file.read(size), dtype)
        return data.reshape(shape, order="F" if fortran else "C")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except Exception as error:  # damaged headers fail in any way
        raise ValueError(f"{path} cannot be read as an array of numbers ({error}).") from error


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and type of what follows in a `.npy` file."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def read_objects(path: str) -> list:
    """The elements of a `.npy` object array of arrays, numbers and texts. Runs no code, whatever the file holds.

    Raises:
        ValueError: the file is no such array.
    """
    try:
        with open_regular(path) as file:
            if not read_header(file)[2].hasobject:
                raise ValueError("it is an array of numbers")
            value = ArrayReader(file).load()
            if not (isinstance(value, Placeholder) and isinstance(value.value, list)):
                raise ValueError("its pickle holds no object array")
            return value.value
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except Exception as error:  # a hostile or damaged pickle can fail in any way
        raise ValueError(
            f"{path} is refused: it must be an object array of arrays, numbers and texts ({error})."
        ) from error


def plain_array(array: np.ndarray) -> bytes:
    """A `.npy` file of numbers."""
    file = BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def object_array(values: Sequence) -> bytes:
    """A `.npy` file of the object array `values`, as every version of numpy reads it with allow_pickle=True."""
    array = np.empty(len(values), object)
    array[:] = values
    file = BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    # numpy 2 names its own module in pickles, which numpy 1 does not have; all versions know the older name.
    pickled = pickle.dumps(array, protocol=3)
    return file.getvalue() + pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


class Placeholder:
    """Stands for an array while a pickle is read: what numpy would be told is interpreted here instead."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):
            self.value = [item.value if isinstance(item, Placeholder) else plain_item(item) for item in data]
        else:
            self.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


class DType:
    """Stands for a numpy dtype; only numbers of fixed size become one."""

    def __init__(self, name: str, *flags):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if not re.fullmatch(r"[fiu][1248]|b1", self.name) or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"an array of type {self.name!r}")
        return np.dtype(self.order + self.name)


class Scalar(Placeholder):
    """Stands for a numpy number."""

    def __new__(cls, dtype: DType, data: bytes):
        return np.frombuffer(data, dtype.numpy())[0]


class ArrayReader(pickle._Unpickler):
    """Knows the names that numpy writes for arrays and numbers, and no other.

    Python's own unpickler, not the one in C: a damaged number makes that one clear gigabytes for its table of objects.
    """

    KNOWN = {
        ("multiarray", "_reconstruct"): Placeholder,
        ("multiarray", "scalar"): Scalar,
        ("numpy", "ndarray"): Placeholder,
        ("numpy", "dtype"): DType,
    }

    def find_class(self, module: str, name: str):
        short = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (short, name) not in self.KNOWN:
            raise ValueError(f"it names {module}.{name}")
        return self.KNOWN[short, name]


def plain_item(item):
    if not isinstance(item, int | float | str | np.number):
        raise ValueError(f"an element of type {type(item).__name__}")
    return item
