-- A database of the eighth schema, with one row in each table of the first. Never to be changed: databases like it are out there.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0008');
CREATE TABLE "copies" (
	rental_id VARCHAR(64) NOT NULL, 
	epoch BIGINT NOT NULL, 
	number BIGINT NOT NULL, 
	at FLOAT NOT NULL, 
	bytes BIGINT NOT NULL, 
	files BIGINT NOT NULL, 
	skipped JSON NOT NULL, 
	salvage BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT pk_copies PRIMARY KEY (rental_id, epoch, number), 
	CONSTRAINT fk_copies_rental_id FOREIGN KEY(rental_id) REFERENCES rentals (id)
);
CREATE TABLE counters (
	name VARCHAR(32) NOT NULL, 
	value INTEGER NOT NULL, 
	CONSTRAINT pk_counters PRIMARY KEY (name)
);
INSERT INTO "counters" VALUES('uid',100007);
CREATE TABLE engine_log (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	at FLOAT NOT NULL, 
	rental_id VARCHAR(64) NOT NULL, 
	epoch INTEGER NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	worker_id VARCHAR(64) NOT NULL, 
	ok BOOLEAN NOT NULL, 
	seconds FLOAT NOT NULL, 
	message TEXT NOT NULL
);
CREATE TABLE events (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	at FLOAT NOT NULL, 
	kind VARCHAR(64) NOT NULL, 
	actor VARCHAR(64) NOT NULL, 
	reason TEXT NOT NULL, 
	owner VARCHAR(64), 
	rental_id VARCHAR(64), 
	worker_id VARCHAR(64), 
	epoch INTEGER, 
	details JSON NOT NULL
);
INSERT INTO "events" VALUES(1,1.0,'rental.activated','reconciler','running on worker w-old',NULL,NULL,NULL,NULL,'{}');
CREATE TABLE idempotency (
	owner VARCHAR(64) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	request_hash VARCHAR(64) NOT NULL, 
	rental_id VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	CONSTRAINT pk_idempotency PRIMARY KEY (owner, "key"), 
	CONSTRAINT fk_idempotency_rental_id FOREIGN KEY(rental_id) REFERENCES rentals (id)
);
INSERT INTO "idempotency" VALUES('alice','key-1','hash','old',1.0);
CREATE TABLE "placements" (
	id VARCHAR(64) NOT NULL, 
	rental_id VARCHAR(64) NOT NULL, 
	worker_id VARCHAR(64) NOT NULL, 
	slot INTEGER NOT NULL, 
	epoch INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	public_key TEXT DEFAULT ('') NOT NULL, 
	created_at FLOAT NOT NULL, 
	standby BOOLEAN DEFAULT 0 NOT NULL, 
	held INTEGER DEFAULT '0' NOT NULL, 
	filled VARCHAR(40) DEFAULT ('') NOT NULL, 
	started VARCHAR(100) DEFAULT '' NOT NULL, 
	salvaged BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT pk_placements PRIMARY KEY (id), 
	CONSTRAINT ck_placements_slot CHECK (slot >= 0), 
	CONSTRAINT uq_placements_rental_id_epoch UNIQUE (rental_id, epoch), 
	CONSTRAINT fk_placements_rental_id FOREIGN KEY(rental_id) REFERENCES rentals (id)
);
INSERT INTO "placements" VALUES('p-old','old','w-old',0,3,'running','',1.0,0,0,'','',0);
CREATE TABLE rentals (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	owner VARCHAR(64) NOT NULL, 
	username VARCHAR(32) NOT NULL, 
	uid INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	epoch INTEGER NOT NULL, 
	public_key TEXT NOT NULL, 
	ttl_s INTEGER NOT NULL, 
	labels JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	activated_at FLOAT, 
	expires_at FLOAT, 
	"end" VARCHAR(16), 
	failures INTEGER DEFAULT '0' NOT NULL, 
	explanation TEXT DEFAULT '' NOT NULL, 
	last_safe_copy_at FLOAT, last_safe_copy_bytes BIGINT, copy_problem TEXT DEFAULT '' NOT NULL, restore_from VARCHAR(40), last_epoch INTEGER DEFAULT '0' NOT NULL, let_in_epoch BIGINT DEFAULT '0' NOT NULL, began_with VARCHAR(40) DEFAULT '' NOT NULL, start TEXT DEFAULT '' NOT NULL, start_run INTEGER DEFAULT '1' NOT NULL, start_problem TEXT DEFAULT '' NOT NULL, takeovers JSON DEFAULT '[]' NOT NULL, public_ports JSON DEFAULT '[]' NOT NULL, lineage JSON DEFAULT '[]' NOT NULL, home_warning TEXT DEFAULT '' NOT NULL, 
	CONSTRAINT pk_rentals PRIMARY KEY (id), 
	CONSTRAINT ck_rentals_uid CHECK (uid >= 100000), 
	CONSTRAINT uq_rentals_uid UNIQUE (uid), 
	CONSTRAINT uq_rentals_username UNIQUE (username)
);
INSERT INTO "rentals" VALUES('old','name-old','alice','r-old',100007,'active',3,'key',60,'{}',1.0,NULL,NULL,NULL,0,'',NULL,NULL,'',NULL,0,0,'','',1,'','[]','[]','[]','');
CREATE TABLE tokens (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	expires_at FLOAT, 
	revoked_at FLOAT, 
	CONSTRAINT pk_tokens PRIMARY KEY (id)
);
INSERT INTO "tokens" VALUES('t-old','alice','client','hash',1.0,NULL,NULL);
CREATE TABLE workers (
	id VARCHAR(64) NOT NULL, 
	hostname VARCHAR(253) NOT NULL, 
	address VARCHAR(45) NOT NULL, 
	host_keys JSON NOT NULL, 
	slots INTEGER NOT NULL, 
	labels JSON NOT NULL, 
	health VARCHAR(16) NOT NULL, 
	intent VARCHAR(16) NOT NULL, 
	token_hash VARCHAR(64) NOT NULL, 
	session_id VARCHAR(64), 
	verified_session VARCHAR(64), 
	boot_id VARCHAR(64) NOT NULL, 
	agent_version VARCHAR(64) NOT NULL, 
	fault TEXT DEFAULT '' NOT NULL, 
	explanation TEXT DEFAULT '' NOT NULL, 
	load JSON NOT NULL, 
	registered_at FLOAT NOT NULL, 
	last_heartbeat_at FLOAT, 
	CONSTRAINT pk_workers PRIMARY KEY (id), 
	CONSTRAINT ck_workers_slots CHECK (slots > 0)
);
INSERT INTO "workers" VALUES('w-old','old','172.20.128.1','["ssh-ed25519 AAAA"]',1,'{}','ready','active','hash',NULL,NULL,'boot-0001','0.1','','','{}',1.0,NULL);
CREATE INDEX ix_events_owner ON events (owner);
CREATE INDEX ix_events_rental_id ON events (rental_id);
CREATE INDEX ix_events_worker_id ON events (worker_id);
CREATE INDEX ix_rentals_state ON rentals (state);
CREATE UNIQUE INDEX uq_rentals_living_name ON rentals (owner, name) WHERE state NOT IN ('released', 'expired', 'failed');
CREATE INDEX ix_workers_address ON workers (address);
CREATE INDEX ix_idempotency_created_at ON idempotency (created_at);
CREATE INDEX ix_engine_log_rental_id ON engine_log (rental_id);
CREATE INDEX ix_rentals_living ON rentals (id) WHERE state NOT IN ('released', 'expired', 'failed');
CREATE INDEX ix_rentals_owner_id ON rentals (owner, id);
CREATE INDEX ix_rentals_name ON rentals (name);
CREATE INDEX ix_rentals_due ON rentals (expires_at) WHERE state NOT IN ('released', 'expired', 'failed');
CREATE UNIQUE INDEX uq_placements_standby ON placements (rental_id) WHERE state IN ('reserved', 'preparing', 'running') AND standby;
CREATE UNIQUE INDEX uq_placements_slot ON placements (worker_id, slot) WHERE state IN ('reserved', 'preparing', 'running', 'stopping', 'stopped', 'failed');
CREATE UNIQUE INDEX uq_placements_live ON placements (rental_id) WHERE state IN ('reserved', 'preparing', 'running') AND NOT standby;
CREATE INDEX ix_placements_state ON placements (state);
CREATE INDEX ix_placements_worker_id_state ON placements (worker_id, state);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',1);
COMMIT;
