"""Every method in every shape that the tests run: each method says its own (`cats.methods.base.Method.shapes`)."""

from cats.methods import small_shapes

SHAPES = small_shapes()
