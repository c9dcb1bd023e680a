"""The ops of Core ML's intermediate language as functions of numpy values, by its documentation."""
