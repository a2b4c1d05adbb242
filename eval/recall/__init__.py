"""What is recalled after others have spoken (`python -m eval.recall`)."""
