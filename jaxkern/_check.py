"""Checks of arguments, raised while tracing: op, argument, what was expected, what came."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi

FLOATS = (np.dtype(jnp.float32), np.dtype(jnp.bfloat16))
INT32 = (np.dtype(np.int32),)


class Sizes:
    """The sizes that the arguments of one call share: the first array to name a size sets it.

    >>> sizes = Sizes("gemm")
    >>> a = sizes.check("a", a, FLOATS, "m k")
    >>> b = sizes.check("b", b, FLOATS, "n k")  # raises if k differs
    """

    def __init__(self, op: str, **known: int):
        self.op = op
        self.known = known

    def __getitem__(self, name: str):
        return self.known[name]

    def check(self, argument: str, x, dtypes, dims: str) -> jax.Array:
        """`x` as an array of one of `dtypes` with the dimensions `dims`, names or numbers; raises otherwise."""
        names = dims.split()
        allowed = [np.dtype(d) for d in dtypes]
        expected = f"{' or '.join(d.name for d in allowed)} [{', '.join(self._describe(n) for n in names)}]"
        x = self.array(argument, x, expected)
        if x.dtype not in allowed:
            raise TypeError(f"{self.op}: {argument} must be {expected}, got {describe(x)}")
        if x.ndim != len(names):
            raise ValueError(f"{self.op}: {argument} must be {expected}, got {describe(x)}")
        for name, size in zip(names, x.shape, strict=True):
            if size != self._bind(name, size):
                raise ValueError(f"{self.op}: {argument} must be {expected}, got {describe(x)}")
        return x

    def array(self, argument: str, x, expected: str = "an array") -> jax.Array:
        """`x` as an array, whole on every device (`_ffi.whole`)."""
        try:
            x = x if isinstance(x, jax.Array) else jnp.asarray(x)
        except (TypeError, ValueError):
            kind = "None" if x is None else type(x).__name__
            raise TypeError(f"{self.op}: {argument} must be {expected}, got {kind}") from None
        return _ffi.whole(x)

    def require_dtype(self, argument: str, dtype, allowed) -> np.dtype:
        try:
            found = None if dtype is None else np.dtype(dtype)
        except TypeError:
            found = None
        names = " or ".join(np.dtype(d).name for d in allowed)
        self.require(
            found is not None and found in allowed, f"{argument} must be {names}, got {found or repr(dtype)}", TypeError
        )
        return found

    def require_integer(self, argument: str, value) -> int:
        """A static integer as Python's own: calls are cached by it, and 2.0 or np.int32(2) would pass for 2 there."""
        return require_integer(self.op, argument, value)

    def require_size(self, argument: str, size) -> int:
        """A static size: positive, and small enough that a few of them multiply within int64."""
        size = self.require_integer(argument, size)
        self.require(1 <= size < 2**31, f"{argument} must be in 1..2**31 - 1, got {size}")
        return size

    def optional_size(self, argument: str, size) -> int | None:
        return None if size is None else self.require_size(argument, size)

    def require(self, holds: bool, message: str, error: type[Exception] = ValueError):
        if not holds:
            raise error(f"{self.op}: {message}")

    def _bind(self, name: str, size):
        return int(name) if name.isdigit() else self.known.setdefault(name, size)

    def _describe(self, name: str) -> str:
        return f"{name}={self.known[name]}" if name in self.known else name


def require_integer(op: str, argument: str, value) -> int:
    try:
        return operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        raise TypeError(f"{op}: {argument} must be an integer, got {value!r}") from None


def describe(x) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
