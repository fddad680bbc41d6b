package main

import (
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// newEtcdCommand is a one-member etcd for tests: plain HTTP on loopback and nothing that survives the test.
func newEtcdCommand() *cobra.Command {
	var dataDir, clientURL, peerURL string
	var noFsync bool
	command := &cobra.Command{
		Use:          "etcd",
		SilenceUsage: true,
		RunE: func(*cobra.Command, []string) error {
			return runEtcd(dataDir, clientURL, peerURL, noFsync)
		},
	}
	flags := command.Flags()
	flags.StringVar(&dataDir, "data-dir", "", "directory for the member's data")
	flags.StringVar(&clientURL, "listen-client-urls", "http://127.0.0.1:2379", "URL for clients")
	flags.StringVar(&peerURL, "listen-peer-urls", "http://127.0.0.1:2380", "URL for peers (there are none)")
	flags.BoolVar(&noFsync, "unsafe-no-fsync", false, "do not wait for the disk; a crash of the machine loses data")
	_ = command.MarkFlagRequired("data-dir")
	return command
}

func runEtcd(dataDir, clientURL, peerURL string, noFsync bool) error {
	client, err := url.Parse(clientURL)
	if err != nil {
		return err
	}
	peer, err := url.Parse(peerURL)
	if err != nil {
		return err
	}
	config := embed.NewConfig()
	config.Name = "test"
	config.Dir = dataDir
	config.UnsafeNoFsync = noFsync
	config.LogLevel = "warn"
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	config.InitialCluster = config.InitialClusterFromName(config.Name)

	server, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	defer server.Close()
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(time.Minute):
		return fmt.Errorf("etcd was not ready within a minute")
	}

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	select {
	case err := <-server.Err():
		return err
	case <-stop:
		return nil
	}
}
