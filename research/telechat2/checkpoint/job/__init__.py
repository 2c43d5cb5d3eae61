"""A conversion as a job: copy, journal, verification, manifest, output folder."""
