"""The real kernel as the judge: User Mode Linux runs what cow runs, on the same images."""
