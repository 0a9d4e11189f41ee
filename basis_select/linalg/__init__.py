"""Pure tensor maths: no model, no input or output."""
