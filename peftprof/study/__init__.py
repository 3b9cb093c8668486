"""Many runs with one question: the paper's matrix, its statistics and its claims."""
