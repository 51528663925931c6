// DATABASE_URL=postgresql://… go run . 10
// A row and its job, in one transaction: both are stored, or neither.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strconv"

	"github.com/jackc/pgx/v5"
)

const enqueue = `select streamworker.enqueue(kind => 'email.send', payload => $1::jsonb, queue => 'email-sending', key => $2)`

// order inserts a row and enqueues its job in the caller's transaction; it returns the job's id.
func order(ctx context.Context, tx pgx.Tx, id, to string) (job string, err error) {
	if _, err = tx.Exec(ctx, "insert into orders values ($1)", id); err != nil {
		return "", err
	}
	payload, err := json.Marshal(map[string]string{"to": to})
	if err != nil {
		return "", err
	}
	err = tx.QueryRow(ctx, enqueue, string(payload), id).Scan(&job)
	return job, err
}

func main() {
	ctx, count := context.Background(), 10
	if len(os.Args) > 1 {
		count, _ = strconv.Atoi(os.Args[1])
	}
	connection, err := pgx.Connect(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close(ctx)
	if _, err := connection.Exec(ctx, "create table if not exists orders (id text primary key)"); err != nil {
		log.Fatal(err)
	}
	for n := range count {
		id := fmt.Sprintf("go-%d", n)
		// Commits if the function returns nil, else rolls back.
		err := pgx.BeginFunc(ctx, connection, func(tx pgx.Tx) error {
			_, err := order(ctx, tx, id, id+"@example.com")
			return err
		})
		if err != nil {
			log.Fatal(err)
		}
	}
}
