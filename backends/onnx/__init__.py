"""ONNX: .onnx files, run by ONNX Runtime."""
