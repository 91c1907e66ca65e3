"""Tokens as colors. NumPy; figures need Pillow.

Words: the *principal components* of tokens are their three directions of most variance, shown as red, green and blue;
a *basis* is fitted once, so that a color keeps its meaning. An *overlay* paints every pixel of the source image in the
color of the token that sees it (`View.patch_at`).

    principal_components.py  tokens -> colors
    color_basis.py           a basis that settles over the first messages
    overlay.py               colors over the image, images side by side
    figures.py               images beside the colors of their tokens, as a PNG
"""
