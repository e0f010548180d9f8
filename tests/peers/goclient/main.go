// SPDX-License-Identifier: Apache-2.0

// An HBONE client made of Go's own TLS and golang.org/x/net/http2 alone:
//
//	goclient ADDR:PORT AUTHORITY METHOD CA.pem [CERT.pem KEY.pem] <bytes >answer
//
// Sends stdin into the tunnel, prints what comes back, and says on stderr how
// it went: one JSON object with the status, or the error and the stage it came at.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"golang.org/x/net/http2"
)

func main() {
	outcome := map[string]any{}
	if stage, err := talk(os.Args[1:], outcome); err != nil {
		outcome["stage"], outcome["error"] = stage, err.Error()
	}
	json.NewEncoder(os.Stderr).Encode(outcome)
}

func talk(args []string, outcome map[string]any) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(args[3])
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		return "arguments", errors.New("no roots in " + args[3])
	}
	// Who the peer is, is not in a DNS name: the chain is checked below, the SPIFFE id by the test.
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	config.VerifyConnection = func(state tls.ConnectionState) error {
		options := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, issuer := range state.PeerCertificates[1:] {
			options.Intermediates.AddCert(issuer)
		}
		outcome["peer"], outcome["alpn"] = state.PeerCertificates[0].URIs[0].String(), state.NegotiatedProtocol
		_, err := state.PeerCertificates[0].Verify(options)
		return err
	}
	if len(args) == 6 {
		pair, err := tls.LoadX509KeyPair(args[4], args[5])
		if err != nil {
			return "arguments", err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", args[0])
	if err != nil {
		return "connect", err
	}
	defer conn.Close()
	h2, err := (&http2.Transport{DisableCompression: true}).NewClientConn(conn)
	if err != nil {
		return "h2", err
	}
	request := &http.Request{Method: args[2], Host: args[1], URL: &url.URL{Scheme: "https", Host: args[1], Path: "/"},
		Header: http.Header{}, Body: io.NopCloser(os.Stdin), ContentLength: -1}
	response, err := h2.RoundTrip(request.WithContext(ctx))
	if err != nil {
		return "request", err
	}
	outcome["status"] = response.StatusCode
	_, err = io.Copy(os.Stdout, response.Body)
	return "body", err
}
