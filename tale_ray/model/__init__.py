"""What is cut: loading a decoder model, finding its layers, running it without some of them."""
