"""The paper's claims as studies: definitions, trainings, tables and figures."""
