# The workers' image with PostgreSQL, for chaos tests only.
ARG WORKER
FROM ${WORKER}
RUN install -d /etc/postgresql-common \
    && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        -o Dpkg::Options::=--force-confold postgresql \
    && rm -rf /var/lib/apt/lists/*
