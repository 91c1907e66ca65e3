"""A calibration file as camera_calibration writes it."""

CALIBRATION = """\
image_width: 64
image_height: 48
camera_name: front
camera_matrix:
  rows: 3
  cols: 3
  data: [50.5, 0, 31.5, 0, 51, 23.5, 0, 0, 1]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [0.1, -0.2, 0.001, 0.002, 0]
rectification_matrix:
  rows: 3
  cols: 3
  data: [1, 0, 0, 0, 1, 0, 0, 0, 1]
projection_matrix:
  rows: 3
  cols: 4
  data: [49, 0, 31, 0, 0, 50, 23, 0, 0, 0, 1, 0]
"""
